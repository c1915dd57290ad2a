use std::path::Path;

use dromedary_records::read_raw_rows;

use super::{Fault, RawContent, RawRow, RawRows, Value};
use crate::Result;

/// The rows of a JSON array or of JSON lines, plain or compressed, one in memory at a time.
pub(super) fn rows(path: &Path) -> Result<RawRows> {
    let rows = read_raw_rows(path)?;
    let progress = rows.progress();
    let rows = (1..).zip(rows).map(|(number, row)| match row {
        Ok(row) => Ok(RawRow { number, content: RawContent::Json(row) }),
        Err(error) => Err(error.into()),
    });
    Ok(RawRows { rows: Box::new(rows), share: Box::new(move || progress.share()) })
}

pub(super) fn parse(row: &dromedary_records::RawRow) -> std::result::Result<Value, Fault> {
    row.parse().map_err(|error| fault(&error))
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
