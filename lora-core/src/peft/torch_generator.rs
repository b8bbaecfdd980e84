/// PyTorch's generator of the CPU, `torch.Generator(device="cpu").manual_seed(seed)`: the Mersenne Twister MT19937 (Matsumoto
/// and Nishimura 1998).
pub(super) struct TorchGenerator {
    state: [u32; N],
    next: usize,
}

const N: usize = 624;

impl TorchGenerator {
    /// Only the seed's lower 32 bits count, as in PyTorch.
    pub(super) fn new(seed: u64) -> TorchGenerator {
        let mut state = [seed as u32; N];
        for i in 1..N {
            let before = state[i - 1];
            state[i] = (before ^ before >> 30).wrapping_mul(1_812_433_253).wrapping_add(i as u32);
        }
        TorchGenerator { state, next: N }
    }

    fn random(&mut self) -> u32 {
        if self.next == N {
            for i in 0..N {
                let y = self.state[i] & 1 << 31 | self.state[(i + 1) % N] & !(1 << 31);
                self.state[i] = self.state[(i + 397) % N] ^ y >> 1 ^ if y & 1 == 1 { 0x9908_b0df } else { 0 };
            }
            self.next = 0;
        }
        let mut y = self.state[self.next];
        self.next += 1;
        y ^= y >> 11;
        y ^= y << 7 & 0x9d2c_5680;
        y ^= y << 15 & 0xefc6_0000;
        y ^ y >> 18
    }

    /// The next numbers of `torch.empty(len).uniform_(-bound, bound, generator=self)`, bit for bit: 24 bits each.
    pub(super) fn uniform(&mut self, bound: f64, len: usize) -> Vec<f32> {
        let (from, to) = (-bound as f32, bound as f32);
        let mut number = || {
            let x = f64::from(self.random() & 0xff_ffff) / f64::from(1 << 24);
            (x * f64::from(to - from) + f64::from(from)) as f32
        };
        (0..len).map(|_| number()).collect()
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    /// `torch.empty(1000).uniform_(-0.5, 0.5, generator=g)` of PyTorch 2.15: its first and last numbers.
    #[test]
    fn numbers_are_pytorchs() {
        for (seed, first, last) in [
            (0, [-0.00374341, 0.2682218, -0.41152257], [-0.1608113, 0.0017943978, -0.09613657]),
            (7, [0.03492254, -0.3011968, 0.1592117], [-0.25274473, -0.09246993, 0.48015028]),
            (4_294_967_301, [0.33025187, -0.3738891, 0.4074697], [0.1672284, -0.013634324, 0.088529885]),
        ] {
            let x = TorchGenerator::new(seed).uniform(0.5, 1000);
            assert_eq!((&x[..3], &x[997..]), (&first[..], &last[..]), "{seed}");
        }
    }
}
