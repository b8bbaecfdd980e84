//! The zip archives that PyTorch writes: entries that are stored as they are, with 64-bit sizes.

use std::{collections::BTreeMap, ops::Range};

type Result<T> = std::result::Result<T, String>;

/// The entries of an archive, by name.
pub(super) struct Archive<'a> {
    bytes: &'a [u8],
    entries: BTreeMap<String, Range<usize>>,
}

const ENTRY: &[u8] = b"PK\x01\x02";
const LOCAL: &[u8] = b"PK\x03\x04";
const END: &[u8] = b"PK\x05\x06";
const END_64: &[u8] = b"PK\x06\x06";
const LOCATOR_64: &[u8] = b"PK\x06\x07";
/// A size that stands elsewhere, with 64 bits.
const ELSEWHERE: u64 = 0xffff_ffff;
const CUT: &str = "it is damaged or cut off; fetch it again";

impl<'a> Archive<'a> {
    /// Reads the directory at the end, and checks every entry against its own header and checksum.
    pub(super) fn open(bytes: &'a [u8]) -> Result<Archive<'a>> {
        const END_SIZE: usize = 22;
        const COMMENT: usize = 1 << 16;
        let from = bytes.len().saturating_sub(END_SIZE + COMMENT);
        let end = bytes[from..]
            .windows(END.len())
            .rposition(|w| w == END)
            .ok_or(format!("a zip file without an end: {CUT}"))?;
        let end = from + end;
        if end + END_SIZE + usize::from(u16_at(bytes, end + 20)?) != bytes.len() {
            return Err(format!("a zip file that ends elsewhere than it says: {CUT}"));
        }
        let mut count = u64::from(u16_at(bytes, end + 10)?);
        let mut start = u64::from(u32_at(bytes, end + 16)?);
        if count == 0xffff || start == ELSEWHERE {
            let locator = end.checked_sub(20).filter(|at| bytes[*at..].starts_with(LOCATOR_64)).ok_or(CUT)?;
            let end = usize::try_from(u64_at(bytes, locator + 8)?).map_err(|_| CUT)?;
            if !bytes.get(end..).is_some_and(|b| b.starts_with(END_64)) {
                return Err(CUT.into());
            }
            (count, start) = (u64_at(bytes, end + 32)?, u64_at(bytes, end + 48)?);
        }
        let mut entries = BTreeMap::new();
        let mut at = usize::try_from(start).map_err(|_| CUT)?;
        for _ in 0..count {
            let (name, range, next) = entry(bytes, at)?;
            if entries.insert(name.clone(), range).is_some() {
                return Err(format!("it has two entries {name}; {CUT}"));
            }
            at = next;
        }
        Ok(Archive { bytes, entries })
    }

    pub(super) fn names(&self) -> impl Iterator<Item = &str> {
        self.entries.keys().map(String::as_str)
    }

    pub(super) fn get(&self, name: &str) -> Option<&'a [u8]> {
        self.entries.get(name).map(|range| &self.bytes[range.clone()])
    }
}

/// The entry that the directory describes at `at`: its name, its bytes, and where the next description begins.
fn entry(bytes: &[u8], at: usize) -> Result<(String, Range<usize>, usize)> {
    if !bytes.get(at..).is_some_and(|b| b.starts_with(ENTRY)) {
        return Err(CUT.into());
    }
    let [flags, method] = [u16_at(bytes, at + 8)?, u16_at(bytes, at + 10)?];
    let sum = u32_at(bytes, at + 16)?;
    let [mut packed, mut size] = [u64::from(u32_at(bytes, at + 20)?), u64::from(u32_at(bytes, at + 24)?)];
    let [names, extras, comment] = [28, 30, 32].map(|i| u16_at(bytes, at + i).map(usize::from));
    let (names, extras, comment) = (names?, extras?, comment?);
    let mut local = u64::from(u32_at(bytes, at + 42)?);
    let name_at = at + 46;
    let name = slice(bytes, name_at, names)?;
    let shown = String::from_utf8_lossy(name).into_owned();
    // Of the three those stand in the 64-bit field that are missing in the others, in this order.
    let mut extra = slice(bytes, name_at + names, extras)?;
    while extra.len() >= 4 {
        let (id, n) = (u16_at(extra, 0)?, usize::from(u16_at(extra, 2)?));
        let field = slice(extra, 4, n)?;
        if id == 1 {
            let mut at = 0;
            for value in [&mut size, &mut packed, &mut local].into_iter().filter(|v| **v == ELSEWHERE) {
                *value = u64_at(field, at)?;
                at += 8;
            }
        }
        extra = &extra[4 + n..];
    }
    if flags & 1 != 0 || method != 0 || packed != size {
        return Err(format!("its entry {shown} is packed or encrypted, which PyTorch's files are not"));
    }
    let local = usize::try_from(local).map_err(|_| CUT)?;
    if !bytes.get(local..).is_some_and(|b| b.starts_with(LOCAL)) {
        return Err(format!("its entry {shown} is not where the directory says; {CUT}"));
    }
    let [own, extra] = [u16_at(bytes, local + 26)?, u16_at(bytes, local + 28)?].map(usize::from);
    if slice(bytes, local + 30, own)? != name {
        return Err(format!("its entry {shown} has another name at its own place; {CUT}"));
    }
    let size = usize::try_from(size).map_err(|_| CUT)?;
    let start = local + 30 + own + extra;
    let data = slice(bytes, start, size).map_err(|_| format!("its entry {shown} claims {size} bytes; {CUT}"))?;
    if crc32(data) != sum {
        return Err(format!("its entry {shown} does not have the bytes that were written; {CUT}"));
    }
    Ok((shown, start..start + size, name_at + names + extras + comment))
}

fn slice(bytes: &[u8], at: usize, n: usize) -> Result<&[u8]> {
    Ok(bytes.get(at..).and_then(|b| b.get(..n)).ok_or(CUT)?)
}

fn number<const N: usize>(bytes: &[u8], at: usize) -> Result<[u8; N]> {
    Ok(*bytes.get(at..).and_then(|b| b.first_chunk()).ok_or(CUT)?)
}

fn u16_at(bytes: &[u8], at: usize) -> Result<u16> {
    number(bytes, at).map(u16::from_le_bytes)
}

fn u32_at(bytes: &[u8], at: usize) -> Result<u32> {
    number(bytes, at).map(u32::from_le_bytes)
}

fn u64_at(bytes: &[u8], at: usize) -> Result<u64> {
    number(bytes, at).map(u64::from_le_bytes)
}

/// The checksum of zip files (CRC-32, reflected polynomial 0xEDB88320).
pub(super) fn crc32(bytes: &[u8]) -> u32 {
    const TABLE: [u32; 256] = {
        let mut table = [0; 256];
        let mut i = 0;
        while i < 256 {
            let (mut c, mut bit) = (i as u32, 0);
            while bit < 8 {
                c = if c & 1 == 1 { 0xedb8_8320 ^ (c >> 1) } else { c >> 1 };
                bit += 1;
            }
            table[i] = c;
            i += 1;
        }
        table
    };
    !bytes.iter().fold(!0, |c, b| TABLE[usize::from(c as u8 ^ b)] ^ (c >> 8))
}

/// An archive of stored entries, each beginning at a multiple of 64 as PyTorch's do.
pub(super) fn write(entries: &[(String, Vec<u8>)]) -> Vec<u8> {
    let (mut out, mut directory) = (Vec::new(), Vec::new());
    for (name, data) in entries {
        let (local, sum) = (out.len() as u32, crc32(data));
        // Name, sizes and checksum, as both headers have them; the time is that of zip's beginning.
        let common = |extra: u16| {
            let mut common: Vec<u8> = [20u16, 0, 0, 0, 0x21].iter().flat_map(|n| n.to_le_bytes()).collect();
            common.extend([sum, data.len() as u32, data.len() as u32].iter().flat_map(|n| n.to_le_bytes()));
            common.extend([name.len() as u16, extra].iter().flat_map(|n| n.to_le_bytes()));
            common
        };
        let begins = out.len() + 30 + name.len() + 4;
        let padding = begins.next_multiple_of(64) - begins;
        out.extend(LOCAL);
        out.extend(common(padding as u16 + 4));
        out.extend(name.as_bytes());
        // A field of zip's for padding, as miniz calls it.
        out.extend(b"FB");
        out.extend((padding as u16).to_le_bytes());
        out.resize(out.len() + padding, b'Z');
        out.extend(data);
        directory.extend(ENTRY);
        directory.extend(20u16.to_le_bytes());
        directory.extend(common(0));
        directory.extend([0u8; 10]);
        directory.extend(local.to_le_bytes());
        directory.extend(name.as_bytes());
    }
    let (start, count) = (out.len() as u32, entries.len() as u16);
    out.extend(&directory);
    out.extend(END);
    out.extend([0, 0, count, count].iter().flat_map(|n: &u16| n.to_le_bytes()));
    out.extend([directory.len() as u32, start].iter().flat_map(|n| n.to_le_bytes()));
    out.extend([0, 0]);
    out
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn the_checksum_is_that_of_zip() {
        assert_eq!(crc32(b"123456789"), 0xcbf4_3926);
    }

    #[test]
    fn what_is_written_is_read_and_damage_is_seen() {
        let entries = [("a/data.pkl".to_owned(), b"hello".to_vec()), ("a/data/0".to_owned(), vec![7; 300])];
        let bytes = write(&entries);
        let archive = Archive::open(&bytes).unwrap();
        assert_eq!(archive.names().collect::<Vec<_>>(), ["a/data.pkl", "a/data/0"]);
        for (name, data) in &entries {
            let found = archive.get(name).unwrap();
            assert_eq!(found, data);
            assert_eq!((found.as_ptr() as usize - bytes.as_ptr() as usize) % 64, 0, "{name}");
        }
        // Whatever is cut or changed, there is an error or the same entries, and never a panic.
        for cut in 0..bytes.len() {
            assert!(Archive::open(&bytes[..cut]).is_err(), "{cut}");
            let mut bad = bytes.clone();
            bad[cut] ^= 0x55;
            if let Ok(archive) = Archive::open(&bad) {
                for name in archive.names() {
                    let data = entries.iter().find(|(n, _)| n == name).map(|(_, d)| d.as_slice());
                    assert!(data.is_none_or(|d| archive.get(name) == Some(d)), "{cut}: {name}");
                }
            }
        }
    }
}
