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
