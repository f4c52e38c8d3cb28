//! TensorBoard event files, written by hand: TFRecord framing around a protobuf message per scalar.
//!
//! The format is TensorFlow's (`tensorflow/core/lib/io/record_writer.cc`, `tensorflow/core/util/event.proto`). Only
//! scalars are written and only steps are read back.

/// A file's first record, which names the format's version.
pub(crate) fn header() -> Vec<u8> {
    let mut event = Vec::new();
    bytes_field(&mut event, FILE_VERSION, b"brain.Event:2");
    record(&event)
}

/// One step's scalars as a record.
pub(crate) fn scalars(step: u64, wall_time_secs: f64, values: &[(&str, f64)]) -> Vec<u8> {
    let mut summary = Vec::new();
    for (tag, value) in values {
        let mut entry = Vec::new();
        bytes_field(&mut entry, TAG, tag.as_bytes());
        key(&mut entry, SIMPLE_VALUE, FOUR_BYTES);
        entry.extend((*value as f32).to_le_bytes());
        bytes_field(&mut summary, SUMMARY_VALUE, &entry);
    }
    let mut event = Vec::new();
    key(&mut event, WALL_TIME, EIGHT_BYTES);
    event.extend(wall_time_secs.to_le_bytes());
    key(&mut event, STEP, VARINT);
    varint(&mut event, step);
    bytes_field(&mut event, SUMMARY, &summary);
    record(&event)
}

/// The whole records at the start of a file up to and including those of `last_step`.
pub(crate) fn up_to_step(file: &[u8], last_step: u64) -> &[u8] {
    let mut end = 0;
    while let Some((event, length)) = first_record(&file[end..]) {
        if step_of(event).is_some_and(|step| step > last_step) {
            break;
        }
        end += length;
    }
    &file[..end]
}

// Field numbers of `Event`, `Summary` and `Summary.Value`.
const WALL_TIME: u64 = 1;
const STEP: u64 = 2;
const FILE_VERSION: u64 = 3;
const SUMMARY: u64 = 5;
const SUMMARY_VALUE: u64 = 1;
const TAG: u64 = 1;
const SIMPLE_VALUE: u64 = 2;

// Protobuf wire types.
const VARINT: u64 = 0;
const EIGHT_BYTES: u64 = 1;
const LENGTH_DELIMITED: u64 = 2;
const FOUR_BYTES: u64 = 5;

fn key(out: &mut Vec<u8>, field: u64, wire_type: u64) {
    varint(out, field << 3 | wire_type);
}

fn bytes_field(out: &mut Vec<u8>, field: u64, bytes: &[u8]) {
    key(out, field, LENGTH_DELIMITED);
    varint(out, bytes.len() as u64);
    out.extend(bytes);
}

fn varint(out: &mut Vec<u8>, mut value: u64) {
    while value >= 0x80 {
        out.push(value as u8 | 0x80);
        value >>= 7;
    }
    out.push(value as u8);
}

/// Length, its checksum, the data, its checksum.
fn record(data: &[u8]) -> Vec<u8> {
    let length = (data.len() as u64).to_le_bytes();
    let mut out = Vec::with_capacity(data.len() + FRAME_BYTES);
    out.extend(length);
    out.extend(masked_crc(&length).to_le_bytes());
    out.extend(data);
    out.extend(masked_crc(data).to_le_bytes());
    out
}

/// Bytes of a record besides its data.
const FRAME_BYTES: usize = 16;

/// Data and whole length of the record a file starts with; `None` if it is cut off or damaged.
fn first_record(file: &[u8]) -> Option<(&[u8], usize)> {
    let length = u64::from_le_bytes(file.get(..8)?.try_into().ok()?);
    let end = usize::try_from(length).ok()?.checked_add(12)?;
    let data = file.get(12..end)?;
    let checksum = u32::from_le_bytes(file.get(end..end.checked_add(4)?)?.try_into().ok()?);
    (checksum == masked_crc(data)).then_some((data, end + 4))
}

/// The step of an event we wrote: its second field, after the nine bytes of the wall time.
fn step_of(event: &[u8]) -> Option<u64> {
    let varint = event.get(9..)?.strip_prefix(&[(STEP << 3 | VARINT) as u8])?;
    let mut step = 0;
    for (at, byte) in varint.iter().take(10).enumerate() {
        step |= u64::from(byte & 0x7f) << (7 * at);
        if byte & 0x80 == 0 {
            return Some(step);
        }
    }
    None
}

/// CRC-32C rotated and offset, so that a checksum over data that holds checksums stays a good one.
fn masked_crc(data: &[u8]) -> u32 {
    crc32c(data).rotate_right(15).wrapping_add(0xa282_ead8)
}

/// CRC-32 with Castagnoli's polynomial, bit by bit: a log writes a few hundred bytes a second.
fn crc32c(data: &[u8]) -> u32 {
    const REVERSED_POLYNOMIAL: u32 = 0x82f6_3b78;
    let shift = |crc: u32| if crc & 1 == 1 { crc >> 1 ^ REVERSED_POLYNOMIAL } else { crc >> 1 };
    !data.iter().fold(!0, |crc, byte| (0..8).fold(crc ^ u32::from(*byte), |crc, _| shift(crc)))
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn crc32c_has_the_published_check_values() {
        // RFC 3720, appendix B.4, and the check value of the polynomial's catalogue entry.
        assert_eq!(crc32c(b"123456789"), 0xe306_9283);
        assert_eq!(crc32c(&[0; 32]), 0x8a91_36aa);
        assert_eq!(crc32c(&[0xff; 32]), 0x62a8_ab43);
    }

    #[test]
    fn a_scalar_record_has_these_bytes() {
        let record = scalars(300, 1.0, &[("loss", 0.5)]);
        let event = [
            &[0x09][..],
            &1f64.to_le_bytes(), // wall time
            &[0x10, 0xac, 0x02], // step 300
            &[0x2a, 13, 0x0a, 11, 0x0a, 4],
            b"loss",
            &[0x15],
            &0.5f32.to_le_bytes(), // summary
        ]
        .concat();
        assert_eq!(record[..8], (event.len() as u64).to_le_bytes());
        assert_eq!(record[12..record.len() - 4], event);
        assert_eq!(record.len(), event.len() + FRAME_BYTES);
    }

    #[test]
    fn records_past_a_step_and_half_records_are_cut() {
        let kept = [header(), scalars(1, 0.0, &[("a", 1.0)]), scalars(200, 0.0, &[("a", 2.0)])].concat();
        let later = scalars(201, 0.0, &[("a", 3.0)]);
        assert_eq!(up_to_step(&[kept.clone(), later.clone()].concat(), 200), kept);
        assert_eq!(up_to_step(&[&kept[..], &later[..later.len() - 1]].concat(), 999), kept);
        assert_eq!(up_to_step(&[&kept[..], &later].concat(), 201).len(), kept.len() + later.len());
        let mut damaged = kept.clone();
        *damaged.last_mut().unwrap() ^= 1;
        assert!(up_to_step(&damaged, 999).len() < kept.len());
    }
}
