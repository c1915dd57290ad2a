//! libtorch: the user's own, or a CPU build in the cache.

use std::{
    env, fs,
    os::unix::fs::symlink,
    path::{Path, PathBuf},
};

use anyhow::{Context, Result, bail, ensure};

use crate::{
    archive,
    cache::Cache,
    packages::{self, CUDA_CUPTI, CUDA_RUNTIME, Fetch, Package, TORCH},
    python,
    terminal::say,
    workspace::Workspace,
};

/// The version that tch binds.
pub const VERSION: &str = "2.13.0";
const FOLDER: &str = "libtorch-2.13.0-cpu";
const VERSION_FILE: &str = "build-version";
/// What is taken from torch's wheel. Not libtorch_cuda.so: torch-sys would link it, and it wants
/// gigabytes of CUDA libraries.
const TORCH_LIBRARIES: [&str; 4] = ["libtorch_cpu.so", "libtorch.so", "libc10.so", "libgomp.so.1"];
const CUDA_LIBRARIES: [&str; 2] = ["libcupti.so.13", "libcudart.so.13"];
/// The unpacked size, with room for the wheels beside it.
const SPACE: u64 = 1_300 << 20;

/// The wheels that make a CPU libtorch.
pub const WHEELS: [Package; 3] = [TORCH, CUDA_CUPTI, CUDA_RUNTIME];

/// Leaves the checkout with a libtorch that plain cargo finds.
pub(crate) fn provide(workspace: &Workspace, cache: &Cache, fetch: &dyn Fetch) -> Result<()> {
    let link = workspace.libtorch_link();
    if env::var_os("LIBTORCH_USE_PYTORCH").is_some() {
        return link_if_none(&link, &pythons_libtorch()?);
    }
    if let Some(folder) = workspace.users_libtorch() {
        ensure!(!folder.is_empty(), "LIBTORCH is set, but empty: unset it or name a libtorch");
        let folder = std::path::absolute(folder)?;
        check_version(&folder_version(&folder)?, &format!("LIBTORCH={}", folder.display()))?;
        return link_if_none(&link, &folder);
    }
    if link.is_dir() && !link.is_symlink() {
        return check_version(&folder_version(&link)?, &link.display().to_string());
    }
    point(&link, &install(cache, &WHEELS, fetch)?)
}

/// The cache's libtorch, put there where it is not.
pub fn install(cache: &Cache, wheels: &[Package], fetch: &dyn Fetch) -> Result<PathBuf> {
    let folder = cache.path(FOLDER);
    if is_complete(&folder) {
        return Ok(folder);
    }
    let lock = cache.lock("libtorch")?;
    if is_complete(&folder) {
        return Ok(folder);
    }
    cache.need_space(SPACE, "libtorch")?;
    let mut fetched = Vec::new();
    for wheel in wheels {
        fetched.push(packages::download(&lock, wheel, fetch)?);
    }
    say!("unpacking libtorch {VERSION} into {}", folder.display());
    let stage = lock.stage()?;
    for wheel in &fetched {
        archive::unpack(wheel, stage.path(), place)?;
    }
    fs::write(stage.path().join(VERSION_FILE), format!("{VERSION}\n"))?;
    ensure!(is_complete(stage.path()), "the wheels do not hold what libtorch needs");
    cache.publish(stage.path(), FOLDER)?;
    for wheel in fetched {
        fs::remove_file(&wheel).with_context(|| format!("cannot remove {}", wheel.display()))?;
    }
    Ok(folder)
}

/// Where a file of the wheels goes.
fn place(name: &str) -> Option<PathBuf> {
    if let Some(header) = name.strip_prefix("torch/include/") {
        return Some(Path::new("include").join(header));
    }
    let library = |folder: &str, names: &[&str]| {
        name.strip_prefix(folder)
            .filter(|library| names.contains(library))
            .map(|library| Path::new("lib").join(library))
    };
    library("torch/lib/", &TORCH_LIBRARIES).or_else(|| library("nvidia/cu13/lib/", &CUDA_LIBRARIES))
}

fn is_complete(folder: &Path) -> bool {
    let libraries = TORCH_LIBRARIES.iter().chain(&CUDA_LIBRARIES);
    libraries.map(|library| folder.join("lib").join(library)).all(|path| path.is_file())
        && folder.join("include/ATen/ATen.h").is_file()
        && folder.join(VERSION_FILE).is_file()
}

/// Points the checkout's link at `folder`; another process sees the old or the new one, never none.
fn point(link: &Path, folder: &Path) -> Result<()> {
    if fs::read_link(link).is_ok_and(|target| target == folder) {
        return Ok(());
    }
    let name = || format!("cannot link {} to {}", link.display(), folder.display());
    let unfinished = link.with_extension(format!("{}.tmp", std::process::id()));
    symlink(folder, &unfinished).with_context(name)?;
    if let Err(error) = fs::rename(&unfinished, link) {
        let _ = fs::remove_file(&unfinished);
        return Err(error).with_context(name);
    }
    say!("{} -> {}", link.display(), folder.display());
    Ok(())
}

/// Makes the user's libtorch the checkout's where the checkout has none, so that a later build
/// without the variable works too.
fn link_if_none(link: &Path, folder: &Path) -> Result<()> {
    if link.exists() { Ok(()) } else { point(link, folder) }
}

/// The folder of the installed Python package torch, its version checked.
fn pythons_libtorch() -> Result<PathBuf> {
    // The interpreter that torch-sys asks.
    let interpreter = if env::var_os("VIRTUAL_ENV").is_some() { "python" } else { "python3" };
    let program = "import os, torch; print(torch.__version__, os.path.dirname(torch.__file__))";
    let answer = python::ask(interpreter, program)
        .context("LIBTORCH_USE_PYTORCH is set, but Python's torch cannot be used")?;
    let (version, folder) =
        answer.split_once(' ').with_context(|| format!("{interpreter} answered {answer:?}"))?;
    check_version(version, &format!("{interpreter}'s torch in {folder}"))?;
    Ok(PathBuf::from(folder))
}

/// The version of the libtorch in `folder`: its `build-version`, else what its headers say.
fn folder_version(folder: &Path) -> Result<String> {
    if let Ok(version) = fs::read_to_string(folder.join(VERSION_FILE)) {
        return Ok(version.trim().to_owned());
    }
    let include = env::var_os("LIBTORCH_INCLUDE").map_or(folder.to_path_buf(), PathBuf::from);
    ["torch/headeronly/version.h", "torch/csrc/api/include/torch/version.h"]
        .iter()
        .filter_map(|header| fs::read_to_string(include.join("include").join(header)).ok())
        .find_map(|text| header_version(&text))
        .with_context(|| {
            format!(
                "no libtorch in {} (neither {VERSION_FILE} nor torch's headers)",
                folder.display()
            )
        })
}

/// The version that torch's version.h defines.
fn header_version(text: &str) -> Option<String> {
    let part = |name: &str| {
        let define = format!("#define TORCH_VERSION_{name} ");
        text.lines().find_map(|line| line.strip_prefix(&define)).map(str::trim)
    };
    Some(format!("{}.{}.{}", part("MAJOR")?, part("MINOR")?, part("PATCH")?))
}

fn check_version(version: &str, which: &str) -> Result<()> {
    let number = version.split('+').next().unwrap_or_default().trim();
    if number == VERSION {
        return Ok(());
    }
    // torch-sys' own way round its check.
    if env::var_os("LIBTORCH_BYPASS_VERSION_CHECK").is_some() {
        say!("{which} is version {version}, not {VERSION}; the check is bypassed");
        return Ok(());
    }
    bail!("{which} is version {version}; tch needs {VERSION}")
}

#[cfg(test)]
mod tests {
    use std::cell::Cell;

    use super::*;
    use crate::packages::Registry;

    #[test]
    fn other_versions_are_refused_with_both_numbers() {
        for good in ["2.13.0", "2.13.0+cpu", "2.13.0+cu130\n"] {
            check_version(good, "LIBTORCH").unwrap();
        }
        for bad in ["2.12.0", "2.13.1+cpu", "2.13", ""] {
            let text = check_version(bad, "LIBTORCH=/x").unwrap_err().to_string();
            assert!(text.contains(&format!("version {bad};")) && text.contains("2.13.0"), "{text}");
        }
    }

    #[test]
    fn the_version_is_read_from_headers_where_no_file_tells_it() {
        let folder = tempfile::tempdir().unwrap();
        assert!(folder_version(folder.path()).unwrap_err().to_string().contains("no libtorch"));
        let header = folder.path().join("include/torch/headeronly/version.h");
        fs::create_dir_all(header.parent().unwrap()).unwrap();
        let text = "#define TORCH_VERSION_MAJOR 2\n#define TORCH_VERSION_MINOR 12\n\
                    #define TORCH_VERSION_PATCH 1\n";
        fs::write(&header, text).unwrap();
        assert_eq!(folder_version(folder.path()).unwrap(), "2.12.1");
        fs::write(folder.path().join(VERSION_FILE), "2.13.0+cpu\n").unwrap();
        assert_eq!(folder_version(folder.path()).unwrap(), "2.13.0+cpu");
    }

    #[test]
    fn only_cpu_libraries_and_headers_are_taken() {
        let placed = |name| place(name).map(|path| path.display().to_string());
        assert_eq!(placed("torch/include/ATen/ATen.h").unwrap(), "include/ATen/ATen.h");
        assert_eq!(placed("torch/lib/libtorch_cpu.so").unwrap(), "lib/libtorch_cpu.so");
        assert_eq!(placed("nvidia/cu13/lib/libcupti.so.13").unwrap(), "lib/libcupti.so.13");
        assert_eq!(placed("torch/lib/libtorch_cuda.so"), None);
        assert_eq!(placed("nvidia/cu13/lib/libnvperf_host.so"), None);
        assert_eq!(placed("torch/version.py"), None);
    }

    /// Brings one wheel that holds everything.
    struct Everything {
        bytes: Vec<u8>,
        fetched: Cell<usize>,
    }

    impl Fetch for Everything {
        fn fetch(&self, package: &Package, folder: &Path) -> Result<()> {
            self.fetched.set(self.fetched.get() + 1);
            Ok(fs::write(folder.join(package.file), &self.bytes)?)
        }
    }

    fn everything() -> (Everything, Package) {
        let torch = TORCH_LIBRARIES.map(|name| format!("torch/lib/{name}"));
        let cuda = CUDA_LIBRARIES.map(|name| format!("nvidia/cu13/lib/{name}"));
        let members: Vec<(&str, &str)> = torch
            .iter()
            .chain(&cuda)
            .map(|name| (name.as_str(), "library"))
            .chain([("torch/include/ATen/ATen.h", "header")])
            .collect();
        let bytes = archive::tests::zip(&members);
        let folder = tempfile::tempdir().unwrap();
        let file = folder.path().join("all.whl");
        fs::write(&file, &bytes).unwrap();
        let wheel = Package {
            registry: Registry::Pypi,
            requirement: "all==1",
            file: "all.whl",
            sha256: packages::sha256(&file).unwrap().leak(),
            size: bytes.len() as u64,
        };
        (Everything { bytes, fetched: Cell::new(0) }, wheel)
    }

    #[test]
    fn the_second_installation_fetches_nothing() {
        let folder = tempfile::tempdir().unwrap();
        let cache = Cache::at(folder.path().join("cache"));
        let (fetch, wheel) = everything();
        let wheels = [wheel];
        let first = install(&cache, &wheels, &fetch).unwrap();
        assert!(is_complete(&first));
        assert_eq!(fs::read_dir(cache.path("downloads")).unwrap().count(), 0);
        assert_eq!(install(&cache, &wheels, &fetch).unwrap(), first);
        assert_eq!(fetch.fetched.get(), 1);
        fs::remove_file(first.join("lib/libtorch_cpu.so")).unwrap();
        install(&cache, &wheels, &fetch).unwrap();
        assert!(is_complete(&first));
        assert_eq!(fetch.fetched.get(), 2);
    }

    #[test]
    fn two_installations_at_once_fetch_once() {
        use std::sync::atomic::{AtomicUsize, Ordering};
        struct Slow(Vec<u8>, AtomicUsize);
        impl Fetch for Slow {
            fn fetch(&self, package: &Package, folder: &Path) -> Result<()> {
                self.1.fetch_add(1, Ordering::SeqCst);
                std::thread::sleep(std::time::Duration::from_millis(200));
                Ok(fs::write(folder.join(package.file), &self.0)?)
            }
        }
        let folder = tempfile::tempdir().unwrap();
        let cache = Cache::at(folder.path().to_path_buf());
        let (everything, wheel) = everything();
        let (fetch, wheels) = (Slow(everything.bytes, AtomicUsize::new(0)), [wheel]);
        std::thread::scope(|scope| {
            for _ in 0..2 {
                scope.spawn(|| install(&cache, &wheels, &fetch).unwrap());
            }
        });
        assert_eq!(fetch.1.load(Ordering::SeqCst), 1);
    }

    #[test]
    fn the_link_is_replaced_and_a_users_libtorch_does_not_replace_it() {
        let folder = tempfile::tempdir().unwrap();
        let link = folder.path().join(".libtorch");
        let (old, new) = (folder.path().join("old"), folder.path().join("new"));
        fs::create_dir_all(&new).unwrap();
        symlink(&old, &link).unwrap();
        link_if_none(&link, &new).unwrap();
        assert_eq!(fs::read_link(&link).unwrap(), new, "a dangling link serves nobody");
        fs::create_dir_all(&old).unwrap();
        link_if_none(&link, &old).unwrap();
        assert_eq!(fs::read_link(&link).unwrap(), new);
        point(&link, &old).unwrap();
        assert_eq!(fs::read_link(&link).unwrap(), old);
        assert_eq!(fs::read_dir(folder.path()).unwrap().count(), 3);
    }
}
