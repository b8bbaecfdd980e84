//! A hash that is the same on every machine and in every version: seeds and the fingerprints in checkpoints rest on it.

/// The 64-bit FNV-1a hash (Fowler, Noll and Vo) of some bytes. Not cryptographic: it finds accidents, not attacks.
///
/// ```
/// assert_eq!(lora_kernels::hash::fnv1a("foobar".bytes()), 0x8594_4171_f739_67e8);
/// ```
pub fn fnv1a(bytes: impl IntoIterator<Item = u8>) -> u64 {
    bytes.into_iter().fold(0xcbf2_9ce4_8422_2325, |h, b| (h ^ u64::from(b)).wrapping_mul(0x0100_0000_01b3))
}
