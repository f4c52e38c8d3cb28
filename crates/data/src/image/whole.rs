//! Whether a picture file is whole, where its decoder does not say: that of jpeg fills what is missing with grey, that of
//! webp stops after the first picture of an animation. PIL refuses both. And what a decoder must not be given: png's
//! panics at a palette that ends within a colour.

const START: [u8; 2] = [0xff, 0xd8];
const END: [u8; 2] = [0xff, 0xd9];
/// Begins the compressed picture, in which a marker's bytes appear as nothing else.
const SCAN: u8 = 0xda;

/// Whether a file begins as a jpeg or webp and ends before its picture does.
pub(crate) fn is_cut_off(file: &[u8]) -> bool {
    match file {
        [b'R', b'I', b'F', b'F', a, b, c, d, behind @ ..] => {
            (behind.len() as u64) < u32::from_le_bytes([*a, *b, *c, *d]).into()
        }
        _ => file.starts_with(&START) && !has_end(file),
    }
}

const PNG_START: [u8; 8] = *b"\x89PNG\r\n\x1a\n";

/// Whether a file is a png with a palette that is no whole number of colours of three bytes.
pub(crate) fn has_broken_palette(file: &[u8]) -> bool {
    let Some(mut chunks) = file.strip_prefix(&PNG_START) else { return false };
    while let [a, b, c, d, kind @ ..] = chunks {
        let length = u32::from_be_bytes([*a, *b, *c, *d]) as usize;
        if kind.starts_with(b"PLTE") && !length.is_multiple_of(3) {
            return true;
        }
        // Behind the kind and the data comes a checksum.
        let Some(rest) = length.checked_add(8).and_then(|behind| kind.get(behind..)) else { return false };
        chunks = rest;
    }
    false
}

/// Whether a jpeg has the marker that ends its picture. The end of a thumbnail in front of it does not count.
fn has_end(file: &[u8]) -> bool {
    scans(file).is_some_and(|scans| scans.windows(2).rev().any(|pair| pair == END))
}

/// What follows the segments before the first scan.
fn scans(file: &[u8]) -> Option<&[u8]> {
    let mut rest = &file[START.len()..];
    loop {
        let marker = *rest.iter().skip_while(|byte| **byte != 0xff).find(|byte| **byte != 0xff)?;
        let at = rest.windows(2).position(|pair| pair[0] == 0xff && pair[1] == marker)? + 2;
        let length = usize::from(u16::from_be_bytes([*rest.get(at)?, *rest.get(at + 1)?]));
        rest = rest.get(at + length..)?;
        if marker == SCAN {
            return Some(rest);
        }
    }
}
