#[cfg(feature = "cuda")]
pub(crate) mod cuda;

use crate::{
    Acc, Mat, MatMut, Result,
    real::{Real, dispatch},
    reduce::{each, put},
};

/// A non-linear function applied to every element.
#[derive(Clone, Copy, Debug, PartialEq, Eq, Hash)]
pub enum Activation {
    /// `x/2 · (1 + tanh(√(2/π)·(x + 0.044715·x³)))` (Hendrycks and Gimpel 2016, arXiv:1606.08415): GPT-2's.
    GeluTanh,
    /// `x/2 · (1 + erf(x/√2))`: the same without approximation.
    GeluErf,
    /// `max(x, 0)`.
    Relu,
    /// `x / (1 + e^(−x))`, also called swish.
    Silu,
    /// The hyperbolic tangent.
    Tanh,
}

impl Activation {
    /// The activation that a Hugging Face configuration means by `name`.
    pub fn from_hf(name: &str) -> Option<Activation> {
        Some(match name {
            "gelu_new" | "gelu_pytorch_tanh" | "gelu_fast" => Activation::GeluTanh,
            "gelu" | "gelu_python" => Activation::GeluErf,
            "relu" => Activation::Relu,
            "silu" | "swish" => Activation::Silu,
            "tanh" => Activation::Tanh,
            _ => return None,
        })
    }

    /// The name in a Hugging Face configuration.
    pub fn hf_name(self) -> &'static str {
        match self {
            Activation::GeluTanh => "gelu_new",
            Activation::GeluErf => "gelu",
            Activation::Relu => "relu",
            Activation::Silu => "silu",
            Activation::Tanh => "tanh",
        }
    }
}

/// `y = f(x)`, element by element.
///
/// # Panics
/// When the shapes or types differ.
pub fn activation(kind: Activation, x: Mat, y: MatMut) -> Result<()> {
    #[cfg(feature = "cuda")]
    if let Some(gpu) = y.gpu() {
        return cuda::activation(gpu, kind, x, y);
    }
    dispatch!("activation", y.dtype(), T => {
        let (x, y) = (x.host::<T>(), y.host::<T>());
        // One loop per function, so that nothing is decided inside it.
        macro_rules! map {
            ($f:path) => {
                each("activation", [x], [y], #[inline(always)] |[x], [y]| {
                    let x = &x[..y.len()];
                    put(y, T::ZERO, #[inline(always)] |i| $f(x[i]));
                })
            };
        }
        match kind {
            Activation::GeluTanh => map!(gelu_tanh),
            Activation::GeluErf => map!(gelu_erf),
            Activation::Relu => map!(relu),
            Activation::Silu => map!(silu),
            Activation::Tanh => map!(Real::tanh),
        }
        Ok(())
    })
}

/// `dx = dy · f′(x)`, with f′ taken anew from x.
///
/// # Panics
/// When the shapes or types differ.
pub fn activation_backward(kind: Activation, x: Mat, dy: Mat, dx: Acc) -> Result<()> {
    #[cfg(feature = "cuda")]
    if let Some(gpu) = x.gpu() {
        return cuda::activation_backward(gpu, kind, x, dy, dx);
    }
    dispatch!("activation_backward", x.dtype(), T => {
        let (x, dy, beta, dx) = (x.host::<T>(), dy.host::<T>(), T::of(dx.beta), dx.to.host::<T>());
        macro_rules! map {
            ($df:path) => {
                each("activation_backward", [x, dy], [dx], #[inline(always)] |[x, dy], [dx]| {
                    let (x, dy) = (&x[..dx.len()], &dy[..dx.len()]);
                    put(dx, beta, #[inline(always)] |i| dy[i] * $df(x[i]));
                })
            };
        }
        match kind {
            Activation::GeluTanh => map!(gelu_tanh_slope),
            Activation::GeluErf => map!(gelu_erf_slope),
            Activation::Relu => map!(relu_slope),
            Activation::Silu => map!(silu_slope),
            Activation::Tanh => map!(tanh_slope),
        }
        Ok(())
    })
}

/// `y = silu(gate) · up`: the gate of SwiGLU (Shazeer 2020, arXiv:2002.05202).
///
/// # Panics
/// When the shapes or types differ.
pub fn silu_gate(gate: Mat, up: Mat, y: MatMut) -> Result<()> {
    #[cfg(feature = "cuda")]
    if let Some(gpu) = y.gpu() {
        return cuda::silu_gate(gpu, gate, up, y);
    }
    dispatch!("silu_gate", y.dtype(), T => {
        each("silu_gate", [gate.host::<T>(), up.host()], [y.host()], #[inline(always)] |[gate, up], [y]| {
            let (gate, up) = (&gate[..y.len()], &up[..y.len()]);
            put(y, T::ZERO, #[inline(always)] |i| silu(gate[i]) * up[i]);
        });
        Ok(())
    })
}

/// The backward pass of [`silu_gate`]: `dgate = dy · up · silu′(gate)`, `dup = dy · silu(gate)`.
///
/// # Panics
/// When the shapes or types differ.
pub fn silu_gate_backward(gate: Mat, up: Mat, dy: Mat, dgate: Option<Acc>, dup: Option<Acc>) -> Result<()> {
    const NAME: &str = "silu_gate_backward";
    #[cfg(feature = "cuda")]
    if let Some(gpu) = dy.gpu() {
        return cuda::silu_gate_backward(gpu, gate, up, dy, dgate, dup);
    }
    dispatch!("silu_gate_backward", dy.dtype(), T => {
        let (gate, up, dy) = (gate.host::<T>(), up.host::<T>(), dy.host::<T>());
        if let Some(Acc { to, beta }) = dgate {
            let beta = T::of(beta);
            each(NAME, [gate, up, dy], [to.host()], #[inline(always)] |[gate, up, dy], [to]| {
                let (gate, up, dy) = (&gate[..to.len()], &up[..to.len()], &dy[..to.len()]);
                put(to, beta, #[inline(always)] |i| dy[i] * up[i] * silu_slope(gate[i]));
            });
        }
        if let Some(Acc { to, beta }) = dup {
            let beta = T::of(beta);
            each(NAME, [gate, dy], [to.host()], #[inline(always)] |[gate, dy], [to]| {
                let (gate, dy) = (&gate[..to.len()], &dy[..to.len()]);
                put(to, beta, #[inline(always)] |i| dy[i] * silu(gate[i]));
            });
        }
        Ok(())
    })
}

/// σ(z) = 1/(1 + e^(−z)) and 1 − σ(z), both to full relative precision.
#[inline(always)]
fn sigmoid<T: Real>(z: T) -> (T, T) {
    let minus = -z;
    // Beyond 80 σ is as good as 0, and e^(−z) stays finite, which its product with σ needs.
    let limit = T::of(80.0);
    let e = (if minus > limit { limit } else { minus }).exp();
    let s = T::ONE / (T::ONE + e);
    (s, e * s)
}

/// z with tanh-GELU(x) = x·σ(z), and dz/dx: (1 + tanh u)/2 is σ(2u), which keeps its digits where tanh u nears −1.
#[inline(always)]
fn gelu_tanh_argument<T: Real>(x: T) -> (T, T) {
    let (c, k) = (T::of(2.0 * std::f64::consts::FRAC_2_PI.sqrt()), T::of(0.044715));
    let x2 = x * x;
    (c * x * x2.mul_add(k, T::ONE), c * x2.mul_add(T::of(3.0 * 0.044715), T::ONE))
}

#[inline(always)]
fn gelu_tanh<T: Real>(x: T) -> T {
    x * sigmoid(gelu_tanh_argument(x).0).0
}

#[inline(always)]
fn gelu_tanh_slope<T: Real>(x: T) -> T {
    let (z, dz) = gelu_tanh_argument(x);
    let (s, rest) = sigmoid(z);
    s * (x * dz).mul_add(rest, T::ONE)
}

/// The normal distribution's Φ(x).
#[inline(always)]
fn normal<T: Real>(x: T) -> T {
    let half = T::of(0.5);
    (x * T::of(std::f64::consts::FRAC_1_SQRT_2)).erf().mul_add(half, half)
}

#[inline(always)]
fn gelu_erf<T: Real>(x: T) -> T {
    x * normal(x)
}

#[inline(always)]
fn gelu_erf_slope<T: Real>(x: T) -> T {
    // √(1/2π), the density's peak.
    let peak = T::of(std::f64::consts::FRAC_1_SQRT_2 * 0.5 * std::f64::consts::FRAC_2_SQRT_PI);
    (x * peak).mul_add((x * x * T::of(-0.5)).exp(), normal(x))
}

// Comparisons that are false for NaN let it through.
#[inline(always)]
fn relu<T: Real>(x: T) -> T {
    if x <= T::ZERO { T::ZERO } else { x }
}

#[inline(always)]
fn relu_slope<T: Real>(x: T) -> T {
    if x <= T::ZERO { T::ZERO } else { T::ONE }
}

#[inline(always)]
fn silu<T: Real>(x: T) -> T {
    x * sigmoid(x).0
}

#[inline(always)]
fn silu_slope<T: Real>(x: T) -> T {
    let (s, rest) = sigmoid(x);
    s * x.mul_add(rest, T::ONE)
}

#[inline(always)]
fn tanh_slope<T: Real>(x: T) -> T {
    // 1 − tanh² = 4·σ(2x)·(1 − σ(2x)).
    let (s, rest) = sigmoid(x + x);
    T::of(4.0) * s * rest
}

#[cfg(test)]
mod tests {
    use super::*;
    use crate::{DType, testing::*};

    const KINDS: [Activation; 5] =
        [Activation::GeluTanh, Activation::GeluErf, Activation::Relu, Activation::Silu, Activation::Tanh];

    fn exact(kind: Activation, x: f64) -> f64 {
        match kind {
            Activation::GeluTanh => {
                0.5 * x * (1.0 + ((2.0 / std::f64::consts::PI).sqrt() * (x + 0.044715 * x.powi(3))).tanh())
            }
            Activation::GeluErf => 0.5 * x * (1.0 + libm::erf(x / 2f64.sqrt())),
            Activation::Relu => x.max(0.0),
            Activation::Silu => x / (1.0 + (-x).exp()),
            Activation::Tanh => x.tanh(),
        }
    }

    /// Random numbers, and some far out.
    fn inputs(n: usize) -> Vec<f64> {
        let mut x = random(1, n, 6.0);
        for (x, far) in x.iter_mut().skip(1).zip([0.0, 20.0, -20.0, 100.0, -100.0, 1e4, -1e4]) {
            *x = far;
        }
        x
    }

    fn slope(kind: Activation, dtype: DType, x: &[f64], dy: &[f64], pad: usize, beta: f64) -> Vec<f64> {
        let (px, pdy) = (Padded::new(dtype, 1, x.len(), pad, x), Padded::new(dtype, 1, x.len(), pad, dy));
        let mut dx = Padded::target(dtype, 1, x.len(), pad, beta, x);
        activation_backward(kind, px.mat(), pdy.mat(), dx.acc(beta)).unwrap();
        dx.get()
    }

    #[test]
    fn equal_their_formulas() {
        for kind in KINDS {
            for (rows, cols) in [(0, 3), (1, 1), (3, 7), (8, 31), (5, 33), (129, 768), (1, 100_001)] {
                let x = inputs(rows * cols);
                let want: Vec<f64> = x.iter().map(|&x| exact(kind, x)).collect();
                for (dtype, pad) in [(DType::F32, 0), (DType::F32, 3), (DType::F64, 2)] {
                    let (px, mut y) = (Padded::new(dtype, rows, cols, pad, &x), Padded::poison(dtype, rows, cols, pad));
                    activation(kind, px.mat(), y.mat_mut()).unwrap();
                    close(kind.hf_name(), &y.get(), &want, tol(dtype, 1e-6));
                }
            }
        }
    }

    #[test]
    fn slopes_are_those_of_finite_differences_in_both_precisions() {
        // Without 0, where relu has no slope.
        let x: Vec<f64> = inputs(129).into_iter().filter(|x| x.abs() > 1e-3).collect();
        let dy = random(2, x.len(), 1.0);
        for kind in KINDS {
            let want: Vec<f64> =
                x.iter().zip(&dy).map(|(&x, dy)| dy * (exact(kind, x + 1e-5) - exact(kind, x - 1e-5)) / 2e-5).collect();
            for beta in [0.0, 1.0] {
                let double = slope(kind, DType::F64, &x, &dy, 0, beta);
                close(kind.hf_name(), &double, &accumulated(&want, beta, &x), 1e-8);
                close(kind.hf_name(), &slope(kind, DType::F32, &x, &dy, 3, beta), &double, 2e-6);
            }
        }
    }

    #[test]
    fn the_gate_and_its_gradients() {
        for n in [1, 7, 33, 768, 40_001] {
            let (gate, up, dy) = (inputs(n), random(3, n, 2.0), random(4, n, 1.0));
            let map = |f: &dyn Fn(usize) -> f64| (0..n).map(f).collect::<Vec<_>>();
            let silu = |i: usize| exact(Activation::Silu, gate[i]);
            for (dtype, pad) in [(DType::F32, 3), (DType::F64, 0)] {
                let of = |x: &[f64]| Padded::new(dtype, 1, n, pad, x);
                let (pg, pu, pdy, mut y) = (of(&gate), of(&up), of(&dy), Padded::poison(dtype, 1, n, pad));
                silu_gate(pg.mat(), pu.mat(), y.mat_mut()).unwrap();
                close("y", &y.get(), &map(&|i| silu(i) * up[i]), tol(dtype, 1e-6));
                for beta in [0.0, 1.0] {
                    let target = || Padded::target(dtype, 1, n, pad, beta, &up);
                    let (mut dg, mut du) = (target(), target());
                    silu_gate_backward(pg.mat(), pu.mat(), pdy.mat(), Some(dg.acc(beta)), None).unwrap();
                    silu_gate_backward(pg.mat(), pu.mat(), pdy.mat(), None, Some(du.acc(beta))).unwrap();
                    close("dup", &du.get(), &accumulated(&map(&|i| dy[i] * silu(i)), beta, &up), tol(dtype, 1e-6));
                    let slopes = slope(Activation::Silu, DType::F64, &gate, &vec![1.0; n], 0, 0.0);
                    let want = map(&|i| dy[i] * up[i] * slopes[i]);
                    close("dgate", &dg.get(), &accumulated(&want, beta, &up), tol(dtype, 2e-6));
                }
            }
        }
    }

    #[test]
    fn nan_goes_through_and_names_return() {
        for kind in KINDS {
            let x = Padded::new(DType::F32, 1, 1, 0, &[f64::NAN]);
            let mut y = Padded::new(DType::F32, 1, 1, 0, &[0.0]);
            activation(kind, x.mat(), y.mat_mut()).unwrap();
            assert!(y.get()[0].is_nan(), "{kind:?} hides NaN");
            assert_eq!(Activation::from_hf(kind.hf_name()), Some(kind));
        }
        assert_eq!(Activation::from_hf("gelu_pytorch_tanh"), Some(Activation::GeluTanh));
        assert_eq!(Activation::from_hf("mish"), None);
    }

    #[test]
    fn same_bits_for_any_number_of_threads() {
        let x = inputs(100_001);
        same_bits("slope", || slope(Activation::GeluTanh, DType::F32, &x, &x, 0, 1.0));
    }
}
