use std::path::Path;

/// Names on the Hugging Face hub that the original takes, and the file to download in their place.
const DOWNLOADS: [(&str, &str); 6] = [
    ("zetavg/ShareGPT-Processed", "its .parquet file"),
    ("Open-Orca/OpenOrca", "1M-GPT4-Augmented.parquet"),
    ("databricks/databricks-dolly-15k", "databricks-dolly-15k.jsonl"),
    ("OpenAssistant/oasst1", "2023-04-12_oasst_ready.messages.jsonl.gz"),
    ("huggyllama/llama-7b", "tokenizer.json"),
    ("meta-llama/Llama-2-70b-hf", "tokenizer.json"),
];

/// Refuses the name of a hub repository, which the original would download, where a file is meant.
pub(crate) fn refuse_hub_name(path: &Path, flag: &str) -> dromedary_command::Result<()> {
    let Some(name) = path.to_str().filter(|name| is_hub_name(name) && !path.exists()) else {
        return Ok(());
    };
    let download = DOWNLOADS
        .iter()
        .find(|(known, _)| known.eq_ignore_ascii_case(name))
        .map_or("the file", |(_, file)| file);
    Err(dromedary_command::Error::usage(format!(
        "{flag} {name}: no such file; if this names a repository on the Hugging Face hub: nothing \
         is downloaded here, so download {download} from https://huggingface.co/{name} (a data \
         set: https://huggingface.co/datasets/{name}) and give its path"
    )))
}

/// `owner/name`, with nothing that looks like a file.
fn is_hub_name(name: &str) -> bool {
    const FILES: [&str; 6] = [".json", ".jsonl", ".parquet", ".gz", ".zst", ".model"];
    let is_word = |part: &str| {
        part.chars().all(|c| c.is_ascii_alphanumeric() || "-_.".contains(c))
            && part.starts_with(|c: char| c.is_ascii_alphanumeric())
    };
    match name.split_once('/') {
        Some((owner, repository)) => {
            is_word(owner)
                && is_word(repository)
                && !FILES.iter().any(|extension| repository.ends_with(extension))
        }
        None => false,
    }
}
