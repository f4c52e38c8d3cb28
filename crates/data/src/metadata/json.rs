//! Rows of json and jsonl: objects in which no name stands twice.

use std::collections::HashSet;
use std::fmt;

use serde::de::{DeserializeSeed, Deserializer, Error, MapAccess, SeqAccess, Visitor};
use serde_json::Value;

use super::read::{Record, check_columns};

/// The objects of a json list; the error says in which row, from 1, the fault lies, if in one.
pub(super) fn list(text: &str) -> Result<Vec<Record>, (Option<usize>, String)> {
    let mut json = serde_json::Deserializer::from_str(text);
    let mut rows = List { records: Vec::new(), in_row: false };
    let read = rows.read(&mut json);
    read.and_then(|()| json.end()).map_err(|fault| {
        let row = rows.in_row.then_some(rows.records.len() + 1);
        (row, fault.to_string())
    })?;
    Ok(rows.records)
}

/// The object of one line.
pub(super) fn object(line: &str) -> Result<Record, String> {
    let mut json = serde_json::Deserializer::from_str(line);
    let record = Object.deserialize(&mut json);
    record.and_then(|record| json.end().map(|()| record)).map_err(|fault| fault.to_string())
}

struct List {
    records: Vec<Record>,
    /// Whether an object has begun that is not read yet.
    in_row: bool,
}

impl List {
    fn read<'de, D: Deserializer<'de>>(&mut self, json: D) -> Result<(), D::Error> {
        json.deserialize_seq(self)
    }
}

impl<'de> Visitor<'de> for &mut List {
    type Value = ();

    fn expecting(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        f.write_str("a list of objects")
    }

    fn visit_seq<A: SeqAccess<'de>>(self, mut rows: A) -> Result<(), A::Error> {
        loop {
            self.in_row = true;
            let Some(record) = rows.next_element_seed(Object)? else { break };
            self.records.push(record);
        }
        self.in_row = false;
        Ok(())
    }
}

/// Reads an object as named texts: null is left out, lists and objects stay JSON.
struct Object;

impl<'de> DeserializeSeed<'de> for Object {
    type Value = Record;

    fn deserialize<D: Deserializer<'de>>(self, json: D) -> Result<Record, D::Error> {
        json.deserialize_map(self)
    }
}

impl<'de> Visitor<'de> for Object {
    type Value = Record;

    fn expecting(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        f.write_str("an object")
    }

    fn visit_map<A: MapAccess<'de>>(self, mut fields: A) -> Result<Record, A::Error> {
        let (mut record, mut seen) = (Record::new(), HashSet::new());
        while let Some((name, value)) = fields.next_entry::<String, Value>()? {
            if !seen.insert(name.clone()) {
                return Err(A::Error::custom(format!("column `{name}` appears twice")));
            }
            check_columns(seen.len()).map_err(A::Error::custom)?;
            match value {
                Value::Null => {}
                Value::String(text) => record.push((name, text)),
                other => record.push((name, other.to_string())),
            }
        }
        Ok(record)
    }
}
