//! The three formats of metadata files, each read whole into records of named text values.

use std::collections::HashSet;
use std::path::Path;

use super::json;
use crate::DataError;

/// The named values of one row.
pub(super) type Record = Vec<(String, String)>;

/// The most columns of a row: each row has its own copy of their names.
const MAX_COLUMNS: usize = 1000;

/// What a row holds, or what is wrong with it.
type Read = Result<Record, DataError>;

/// Reads the bytes of a file in the format its extension names.
pub(super) fn records(path: &Path, bytes: Vec<u8>) -> Result<Vec<Read>, DataError> {
    let extension = path.extension().unwrap_or_default().to_string_lossy().to_lowercase();
    let parse = match extension.as_str() {
        "csv" => csv_records,
        "json" => json_records,
        "jsonl" => jsonl_records,
        _ => return Err(DataError::Format { path: path.into(), found: extension }),
    };
    let text =
        String::from_utf8(bytes).map_err(|fault| malformed(path, None, format!("not UTF-8: {fault}")))?;
    // Spreadsheets write a byte order mark; it is no part of the first column's name.
    parse(path, text.trim_start_matches('\u{feff}'))
}

fn csv_records(path: &Path, text: &str) -> Result<Vec<Read>, DataError> {
    let mut reader = csv::Reader::from_reader(text.as_bytes());
    let header = reader.headers().map_err(|fault| malformed(path, None, fault.to_string()))?.clone();
    check_header(&header).map_err(|reason| malformed(path, None, reason))?;
    let named =
        |record: csv::StringRecord| header.iter().zip(&record).map(|(n, v)| (n.into(), v.into())).collect();
    let rows = reader.records().zip(1..);
    let read = |(record, row): (csv::Result<csv::StringRecord>, usize)| {
        record.map(named).map_err(|fault| malformed(path, Some(row), csv_reason(&fault)))
    };
    Ok(rows.map(read).collect())
}

fn check_header(header: &csv::StringRecord) -> Result<(), String> {
    check_columns(header.len())?;
    let mut seen = HashSet::new();
    match header.iter().find(|name| !seen.insert(*name)) {
        Some(twice) => Err(format!("column `{twice}` appears twice in the header")),
        None => Ok(()),
    }
}

pub(super) fn check_columns(found: usize) -> Result<(), String> {
    match found <= MAX_COLUMNS {
        true => Ok(()),
        false => Err(format!("found {found} columns, expected at most {MAX_COLUMNS}")),
    }
}

/// The csv crate's own message also numbers the records, from another start than ours.
fn csv_reason(fault: &csv::Error) -> String {
    match fault.kind() {
        csv::ErrorKind::UnequalLengths { expected_len, len, .. } => {
            format!(
                "found {len} values, expected {expected_len} as in the header\nhint: put values with commas into double quotes"
            )
        }
        _ => fault.to_string(),
    }
}

fn json_records(path: &Path, text: &str) -> Result<Vec<Read>, DataError> {
    let rows = json::list(text).map_err(|(row, reason)| malformed(path, row, reason))?;
    Ok(rows.into_iter().map(Ok).collect())
}

fn jsonl_records(path: &Path, text: &str) -> Result<Vec<Read>, DataError> {
    let lines = text.lines().filter(|line| !line.trim().is_empty()).zip(1..);
    let parse = |(line, row)| json::object(line).map_err(|reason| malformed(path, Some(row), reason));
    Ok(lines.map(parse).collect())
}

fn malformed(path: &Path, row: Option<usize>, reason: String) -> DataError {
    DataError::Malformed { path: path.into(), row, reason }
}
