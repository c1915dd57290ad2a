use std::path::{Path, PathBuf};

use dromedary_command::{Progress, required};
use dromedary_files::AtomicFile;
use dromedary_records::{Prompt, read_prompts};
use polars::prelude::{
    Column, DataFrame, DataType, Field, ParquetCompression, ParquetWriter, Schema,
};
use serde::{Deserialize, Serialize};

use super::settings::refuse_overwriting;
use super::{Session, bytes_of};
use crate::sources::{found_files, one_or_many};
use crate::{Error, Result};

/// Rows of a row group, all of which are in memory at once.
const ROW_GROUP: usize = 1 << 16;

const COLUMNS: [&str; 4] = ["id", "source", "instruction", "input"];

/// Flags of `export-parquet`.
#[derive(Clone, Debug, Default, PartialEq, clap::Args, Serialize, Deserialize)]
#[serde(default)]
pub struct ExportArgs {
    /// Files of prompts, as the other commands write them: files, folders or patterns, separated by
    /// commas.
    #[arg(long, value_name = "FILES", value_delimiter = ',')]
    #[serde(deserialize_with = "one_or_many")]
    pub prompts: Vec<PathBuf>,
    /// Where the parquet file goes: text columns id, source, instruction, input.
    #[arg(long, value_name = "FILE", alias = "output-path")]
    pub output_file: Option<PathBuf>,
}

/// Settings of [`export_parquet`].
#[derive(Clone, Debug, PartialEq, Serialize)]
pub struct ExportConfig {
    /// Files of prompts.
    pub prompts: Vec<PathBuf>,
    /// Where the parquet file goes.
    pub output_file: PathBuf,
}

impl TryFrom<ExportArgs> for ExportConfig {
    type Error = dromedary_command::Error;

    fn try_from(args: ExportArgs) -> dromedary_command::Result<ExportConfig> {
        let given = Some(args.prompts).filter(|files| !files.is_empty());
        let prompts = found_files(&required(given, "prompts")?, "--prompts")?;
        let output_file = required(args.output_file, "output_file")?;
        refuse_overwriting(&output_file, &prompts)?;
        Ok(ExportConfig { prompts, output_file })
    }
}

/// Writes prompts as one parquet file for other tools; returns how many.
///
/// # Errors
/// A file that cannot be read or written, a row that is no prompt, no row at all, a stop. Nothing
/// is written then.
pub fn export_parquet(config: &ExportConfig, session: &Session) -> Result<u64> {
    let path = &config.output_file;
    let mut file = AtomicFile::create(path)?;
    let failed = |source| Error::WriteParquet { path: path.clone(), source };
    let schema = COLUMNS.map(|name| Field::new(name.into(), DataType::String));
    let mut writer = ParquetWriter::new(&mut file)
        .with_compression(ParquetCompression::Zstd(None))
        // It would start a pool of its own.
        .set_parallel(false)
        .batched(&Schema::from_iter(schema))
        .map_err(failed)?;
    let progress = Progress::new(None, "rows", session.show_progress);
    let mut rows = 0;
    for input in &config.prompts {
        let mut prompts = read_prompts(input)?;
        loop {
            session.check_stop()?;
            let group: Vec<Prompt> =
                prompts.by_ref().take(ROW_GROUP).collect::<std::result::Result<_, _>>()?;
            if group.is_empty() {
                break;
            }
            rows += group.len() as u64;
            progress.inc(group.len() as u64);
            writer.write_batch(&frame(&group).map_err(failed)?).map_err(failed)?;
        }
    }
    if rows == 0 {
        let path = config.prompts.last().cloned().unwrap_or_default();
        return Err(Error::NoRows { path });
    }
    writer.finish().map_err(failed)?;
    drop(writer);
    file.commit()?;
    progress.finish();
    log(path, rows);
    Ok(rows)
}

fn log(path: &Path, rows: u64) {
    tracing::info!("{rows} rows written to {} ({} bytes)", path.display(), bytes_of(path));
}

fn frame(prompts: &[Prompt]) -> polars::error::PolarsResult<DataFrame> {
    type Text = fn(&Prompt) -> &str;
    let texts: [Text; 4] = [|p| &p.id, |p| &p.source, |p| &p.instruction, |p| &p.input];
    let columns = COLUMNS.into_iter().zip(texts).map(|(name, text)| {
        Column::new(name.into(), prompts.iter().map(text).collect::<Vec<&str>>())
    });
    DataFrame::new(prompts.len(), columns.collect())
}
