use std::path::Path;

use dromedary_records::read_rows;

use super::{Fault, Row, Rows, Value};
use crate::Result;

/// The rows of a JSON array or of JSON lines, plain or compressed, one in memory at a time.
pub(super) fn rows(path: &Path) -> Result<Rows> {
    let rows = (1..).zip(read_rows::<Value>(path)?).map(|(number, row)| match row {
        Ok(value) => Ok(Row { number, content: Ok(value) }),
        Err(error) if error.is_bad_row() => Ok(Row { number, content: Err(fault(&error)) }),
        Err(error) => Err(error.into()),
    });
    Ok(Box::new(rows))
}

/// The message alone: file and row are named where the fault is reported.
fn fault(error: &dromedary_records::Error) -> Fault {
    use dromedary_records::Error::{File, Row};
    let message = match error {
        Row { message, .. } => message.clone(),
        File(dromedary_files::Error::Row { message, line, .. }) => {
            format!("line {line}: {message}")
        }
        other => other.to_string(),
    };
    Fault(format!("is not valid JSON: {message}"))
}
