//! Machine code of other GPUs out of a library: overwritten with zeros, so that it compresses to nothing and everything else stays
//! where it was.

/// What a container of machine code begins with.
const MAGIC: [u8; 4] = 0xba55_ed50u32.to_le_bytes();
/// Its header.
const HEADER: usize = 16;
/// Least header of an entry.
const ENTRY: usize = 32;
/// Kinds of an entry: PTX, which a driver translates, and machine code. Others are intermediate code that is linked at run time, for any
/// architecture.
const PTX: u16 = 1;
const CUBIN: u16 = 2;

fn number<const N: usize>(bytes: &[u8], at: usize) -> Option<u64> {
    let mut word = [0; 8];
    word[..N].copy_from_slice(bytes.get(at..at + N)?);
    Some(u64::from_le_bytes(word))
}

struct Code {
    kind: u16,
    arch: u32,
    payload: std::ops::Range<usize>,
}

/// The entries of the container at `at`, and its end; nothing where there is none.
fn container(bytes: &[u8], at: usize) -> Option<(Vec<Code>, usize)> {
    let (version, header) = (number::<2>(bytes, at + 4)?, number::<2>(bytes, at + 6)? as usize);
    let size = usize::try_from(number::<8>(bytes, at + 8)?).ok()?;
    let end = at.checked_add(header)?.checked_add(size)?;
    if version != 1 || header != HEADER || size == 0 || end > bytes.len() {
        return None;
    }
    let (mut entries, mut next) = (Vec::new(), at + header);
    while next + ENTRY <= end {
        let header = number::<4>(bytes, next + 4)? as usize;
        let size = usize::try_from(number::<8>(bytes, next + 8)?).ok()?;
        let start = next.checked_add(header)?;
        let stop = start.checked_add(size)?;
        if header < ENTRY || stop > end {
            break;
        }
        let (kind, arch) = (number::<2>(bytes, next)? as u16, number::<4>(bytes, next + 28)? as u32);
        entries.push(Code { kind, arch, payload: start..stop });
        next = stop;
    }
    Some((entries, end))
}

/// Zeros what an `sm_{arch}` has no use for, and returns how many bytes that were: machine code of other generations, which it can't run;
/// and, in containers with code for `arch` itself, all other and PTX.
///
/// Code that is linked at run time stays, as does PTX that the driver may have to translate.
pub fn keep_only(library: &mut [u8], arch: u32) -> u64 {
    let (mut at, mut zeroed) = (0, 0);
    while let Some(found) = library[at..].windows(MAGIC.len()).position(|window| window == MAGIC) {
        let start = at + found;
        let Some((entries, end)) = container(library, start) else {
            at = start + MAGIC.len();
            continue;
        };
        let has_own = entries.iter().any(|code| code.kind == CUBIN && code.arch == arch);
        // Machine code runs on the minor versions from its own on of its major one.
        let runs = |code: &Code| code.arch / 10 == arch / 10 && code.arch <= arch;
        let is_useless = |code: &Code| match code.kind {
            PTX => has_own,
            CUBIN => {
                if has_own {
                    code.arch != arch
                } else {
                    !runs(code)
                }
            }
            _ => false,
        };
        for code in entries.into_iter().filter(is_useless) {
            zeroed += code.payload.len() as u64;
            library[code.payload].fill(0);
        }
        at = end;
    }
    zeroed
}

#[cfg(test)]
mod tests {
    use super::*;

    fn entry(kind: u16, arch: u32, payload: &[u8]) -> Vec<u8> {
        let mut bytes = vec![0; 64];
        bytes[..2].copy_from_slice(&kind.to_le_bytes());
        bytes[4..8].copy_from_slice(&64u32.to_le_bytes());
        bytes[8..16].copy_from_slice(&(payload.len() as u64).to_le_bytes());
        bytes[28..32].copy_from_slice(&arch.to_le_bytes());
        bytes.extend_from_slice(payload);
        bytes
    }

    fn of(entries: &[Vec<u8>]) -> Vec<u8> {
        let size: usize = entries.iter().map(Vec::len).sum();
        let mut bytes = MAGIC.to_vec();
        bytes.extend_from_slice(&1u16.to_le_bytes());
        bytes.extend_from_slice(&16u16.to_le_bytes());
        bytes.extend_from_slice(&(size as u64).to_le_bytes());
        entries.iter().for_each(|entry| bytes.extend_from_slice(entry));
        bytes
    }

    #[test]
    fn only_what_is_for_others_goes() {
        let several =
            of(&[entry(2, 80, b"ampere"), entry(2, 90, b"hopper"), entry(1, 90, b"ptx"), entry(8, 75, b"linked")]);
        // Of another generation, with something to translate; and of an older GPU of the same.
        let (only_other, older) =
            (of(&[entry(2, 80, b"elder"), entry(1, 70, b"translated")]), of(&[entry(2, 86, b"alone")]));
        // Something that begins like a container and is none.
        let broken = [&MAGIC[..], &[9; 30]].concat();
        let whole = [b"elf".to_vec(), several, broken.clone(), only_other, older, b"end".to_vec()].concat();
        let mut library = whole.clone();
        assert_eq!(keep_only(&mut library, 90), 6 + 3 + 5 + 5);
        assert_eq!(library.len(), whole.len());
        let has = |library: &[u8], text: &[u8]| library.windows(text.len()).any(|window| window == text);
        let kept: [&[u8]; 6] = [b"hopper", b"linked", b"translated", b"elf", b"end", &broken];
        assert!(kept.iter().all(|text| has(&library, text)));
        let gone: [&[u8]; 4] = [b"ampere", b"ptx", b"elder", b"alone"];
        assert!(gone.iter().all(|text| !has(&library, text)));
        // What runs on an older GPU of the generation runs on a newer one.
        let mut library = whole;
        keep_only(&mut library, 89);
        assert!(
            has(&library, b"ampere") && has(&library, b"elder") && has(&library, b"alone") && !has(&library, b"hopper")
        );
        assert_eq!(keep_only(&mut library[..4], 90), 0);
    }
}
