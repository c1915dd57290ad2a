//! The system's packages: found, or installed through apt where the user agrees.

use std::{
    env, fs,
    io::{self, IsTerminal, Write},
    path::{Path, PathBuf},
    process::{Command, Stdio},
};

use anyhow::{Context, Result, bail};

use super::Purpose;
use crate::{
    Ended, browser,
    terminal::{self, say},
};

/// Something that the build or the tests need from the system.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub enum Need {
    /// `mpicc` with its headers, and a launcher.
    Mpi,
    /// The headers of an Open MPI whose programs are there.
    OpenMpiHeaders,
    /// The headers of an MPICH whose programs are there.
    MpichHeaders,
    /// For the bindings to MPI's headers.
    Libclang,
    /// For libtorch's C++.
    Cxx,
    /// For C libraries that crates build.
    Make,
    /// For finding C libraries.
    PkgConfig,
    /// For looking at the pages that the stages write.
    Browser,
    /// For tests of the batch scripts.
    Slurm,
}

impl Need {
    /// What is lacking, in words.
    pub fn what(self) -> &'static str {
        match self {
            Self::Mpi => "MPI with headers (mpicc, mpirun)",
            Self::OpenMpiHeaders => "the headers of Open MPI",
            Self::MpichHeaders => "the headers of MPICH",
            Self::Libclang => "libclang",
            Self::Cxx => "g++",
            Self::Make => "make",
            Self::PkgConfig => "pkg-config",
            Self::Browser => "Chromium (for tests of the pages)",
            Self::Slurm => "Slurm with its daemons, and munge (for tests of the batch scripts)",
        }
    }

    /// Debian's packages that bring it.
    pub fn packages(self) -> &'static [&'static str] {
        match self {
            Self::Mpi => &["libopenmpi-dev", "openmpi-bin"],
            Self::OpenMpiHeaders => &["libopenmpi-dev"],
            Self::MpichHeaders => &["libmpich-dev"],
            Self::Libclang => &["libclang-dev"],
            Self::Cxx => &["g++"],
            Self::Make => &["make"],
            Self::PkgConfig => &["pkg-config"],
            // Without a font its pictures have no text.
            Self::Browser => &["chromium", "fonts-dejavu-core"],
            Self::Slurm => &["munge", "slurm-wlm", "slurm-wlm-basic-plugins"],
        }
    }

    /// What its packages do beyond lying there.
    fn consequence(self) -> Option<&'static str> {
        (self == Self::Slurm).then_some(
            "where systemd runs, Debian's munge makes a key in /etc/munge and starts munge.service; slurmctld \
             and slurmd do not start without an /etc/slurm/slurm.conf; the tests use daemons of their own",
        )
    }

    /// Whether everything but some tests does without it.
    fn is_for_tests(self) -> bool {
        self == Self::Browser
    }
}

/// Who may install, and whether anybody can be asked.
#[derive(Debug, Clone, Copy)]
struct Means {
    agreed: bool,
    terminal: bool,
    apt: bool,
    root: bool,
    sudo: bool,
}

/// What is done about lacking packages.
#[derive(Debug, PartialEq, Eq)]
enum Decision {
    Install,
    Ask,
    Tell,
}

fn decide(means: Means) -> Decision {
    match means {
        Means { apt: false, .. } | Means { root: false, sudo: false, .. } => Decision::Tell,
        Means { agreed: true, .. } => Decision::Install,
        Means { terminal: true, .. } => Decision::Ask,
        _ => Decision::Tell,
    }
}

/// Installs what the system lacks, asks, or names the one command that does; where tests alone would
/// miss it, that is all.
pub(crate) fn provide(purpose: Purpose, yes: bool) -> Result<()> {
    let lacking = lacking(purpose);
    if lacking.is_empty() {
        return Ok(());
    }
    for need in &lacking {
        say!("lacking: {}", need.what());
        if let Some(consequence) = need.consequence() {
            say!("  {consequence}");
        }
    }
    let means = Means {
        agreed: yes || env::var("CI").is_ok_and(|value| value == "true" || value == "1"),
        terminal: io::stdin().is_terminal() && io::stderr().is_terminal(),
        apt: on_path("apt-get"),
        root: rustix::process::geteuid().is_root(),
        sudo: on_path("sudo"),
    };
    let install = install_words(&lacking, means.root);
    match decide(means) {
        Decision::Install => {}
        Decision::Ask if asked(&install.join(" "))? => {}
        _ if lacking.iter().all(|need| need.is_for_tests()) => {
            say!("going on without; this installs it on Debian: {}", install.join(" "));
            return Ok(());
        }
        Decision::Ask | Decision::Tell if means.apt => bail!(Ended::NeedsUser(format!(
            "the system lacks packages; this installs them: {}",
            install.join(" ")
        ))),
        Decision::Ask | Decision::Tell => bail!(Ended::NeedsUser(format!(
            "the system lacks {}, and there is no apt-get here: install them with your system's \
             package manager (Debian's names: {}) or load your cluster's modules",
            lacking.iter().map(|need| need.what()).collect::<Vec<_>>().join(", "),
            packages(&lacking).join(" ")
        ))),
    }
    apply(&install, means)?;
    let still = self::lacking(purpose);
    if !still.is_empty() {
        let still: Vec<_> = still.iter().map(|need| need.what()).collect();
        bail!("apt-get installed the packages, but this is still lacking: {}", still.join(", "));
    }
    Ok(())
}

fn asked(command: &str) -> Result<bool> {
    eprint!("Install with `{command}`? [y/N] ");
    io::stderr().flush()?;
    let mut answer = String::new();
    io::stdin().read_line(&mut answer).context("cannot read the answer")?;
    Ok(matches!(answer.trim(), "y" | "Y" | "yes"))
}

fn packages(needs: &[Need]) -> Vec<&'static str> {
    let mut packages: Vec<_> = needs.iter().flat_map(|need| need.packages()).copied().collect();
    packages.sort_unstable();
    packages.dedup();
    packages
}

fn install_words(needs: &[Need], root: bool) -> Vec<&'static str> {
    let sudo: &[&str] = if root { &[] } else { &["sudo"] };
    let apt = ["apt-get", "install", "--yes", "--no-install-recommends"];
    sudo.iter().copied().chain(apt).chain(packages(needs)).collect()
}

fn apply(install: &[&str], means: Means) -> Result<()> {
    // sudo clears the environment, so the variable goes to apt-get through env.
    let run = |words: &[&str]| {
        let (sudo, words) = match words.split_first() {
            Some((&"sudo", rest)) => (Some("sudo"), rest),
            _ => (None, words),
        };
        let mut command = match sudo {
            Some(sudo) => {
                let mut command = Command::new(sudo);
                // Without a terminal nobody can type a password.
                command.args((!means.terminal).then_some("-n"));
                command.arg("env");
                command
            }
            None => Command::new("env"),
        };
        command.arg("DEBIAN_FRONTEND=noninteractive").args(words);
        command.args(["-o", "DPkg::Lock::Timeout=300"]);
        if !means.terminal {
            command.stdin(Stdio::null());
        }
        terminal::run(&mut command)
    };
    let mut update = install.to_vec();
    let apt = update.iter().position(|word| *word == "apt-get").unwrap_or_default();
    update.truncate(apt + 1);
    update.push("update");
    // An old package list may still do; if it does not, the installation says so.
    if let Err(error) = run(&update) {
        say!("going on with the package list as it is: {error:#}");
    }
    run(install)
}

/// What is needed and the system does not have.
pub fn lacking(purpose: Purpose) -> Vec<Need> {
    let cxx = env::var("CXX").unwrap_or_else(|_| "c++".to_owned());
    let pkg_config = env::var("PKG_CONFIG").unwrap_or_else(|_| "pkg-config".to_owned());
    let first_word =
        |command: &str| command.split_whitespace().next().unwrap_or_default().to_owned();
    [
        (!on_path(&first_word(&cxx))).then_some(Need::Cxx),
        lacking_mpi(),
        (!has_libclang()).then_some(Need::Libclang),
        (!on_path("make")).then_some(Need::Make),
        (!on_path(&pkg_config)).then_some(Need::PkgConfig),
        (purpose != Purpose::Build && browser::find().is_none()).then_some(Need::Browser),
        (purpose == Purpose::Slurm && !has_slurm()).then_some(Need::Slurm),
    ]
    .into_iter()
    .flatten()
    .collect()
}

fn lacking_mpi() -> Option<Need> {
    let compiler = env::var("MPICC").unwrap_or_else(|_| "mpicc".to_owned());
    let launcher = ["mpirun", "mpiexec", "srun"].into_iter().find(|name| on_path(name));
    if launcher.is_some() && includes_mpi(&compiler) {
        return None;
    }
    // Programs without headers: the headers of the same MPI, not a second MPI beside it.
    let version = launcher
        .filter(|name| *name != "srun")
        .and_then(|name| Command::new(name).arg("--version").stdin(Stdio::null()).output().ok())
        .map(|output| String::from_utf8_lossy(&output.stdout).into_owned())
        .unwrap_or_default();
    if version.contains("Open MPI") {
        Some(Need::OpenMpiHeaders)
    } else if version.contains("HYDRA") || version.contains("MPICH") {
        Some(Need::MpichHeaders)
    } else {
        Some(Need::Mpi)
    }
}

/// Whether `compiler` finds mpi.h (Debian's mpicc comes without it).
fn includes_mpi(compiler: &str) -> bool {
    let child = Command::new(compiler)
        .args(["-E", "-x", "c", "-"])
        .stdin(Stdio::piped())
        .stdout(Stdio::null())
        .stderr(Stdio::null())
        .spawn();
    let Ok(mut child) = child else { return false };
    if let Some(mut input) = child.stdin.take() {
        // A compiler that ends before it reads is judged by its exit status.
        let _ = input.write_all(b"#include <mpi.h>\n");
    }
    child.wait().is_ok_and(|status| status.success())
}

/// Its daemons are in a folder that users seldom have on their PATH.
fn has_slurm() -> bool {
    let has = |name: &&str| {
        on_path(name)
            || ["/usr/sbin", "/sbin"].iter().any(|path| Path::new(path).join(name).is_file())
    };
    ["munged", "sbatch", "slurmctld", "slurmd"].iter().all(has)
}

fn has_libclang() -> bool {
    if let Some(path) = env::var_os("LIBCLANG_PATH") {
        let path = PathBuf::from(path);
        return is_libclang(&path) || holds_libclang(&path);
    }
    let asked = Command::new("llvm-config").arg("--libdir").output().ok();
    let named = asked
        .filter(|output| output.status.success())
        .map(|output| PathBuf::from(String::from_utf8_lossy(&output.stdout).trim()));
    let llvms = subfolders(Path::new("/usr/lib"), "llvm").into_iter().map(|llvm| llvm.join("lib"));
    let usual = ["/usr/lib64", "/usr/lib", "/usr/local/lib"].map(PathBuf::from);
    named.into_iter().chain(llvms).chain(usual).any(|folder| {
        // The library alone cannot parse mpi.h: it needs the compiler's own headers beside it.
        holds_libclang(&folder)
            && subfolders(&folder.join("clang"), "")
                .iter()
                .any(|version| version.join("include/stddef.h").is_file())
    })
}

fn subfolders(folder: &Path, prefix: &str) -> Vec<PathBuf> {
    let Ok(entries) = fs::read_dir(folder) else { return Vec::new() };
    let mut folders: Vec<_> = entries
        .flatten()
        .filter(|entry| entry.file_name().to_string_lossy().starts_with(prefix))
        .map(|entry| entry.path())
        .collect();
    folders.sort();
    folders
}

fn holds_libclang(folder: &Path) -> bool {
    subfolders(folder, "libclang").iter().any(|path| is_libclang(path))
}

/// `libclang.so`, `libclang.so.14`, `libclang-14.so`, `libclang-14.so.1`; not `libclang-cpp.so`.
fn is_libclang(path: &Path) -> bool {
    let name = path.file_name().map(|name| name.to_string_lossy().into_owned()).unwrap_or_default();
    let Some(rest) = name.strip_prefix("libclang") else { return false };
    let rest = match rest.strip_prefix('-') {
        Some(version) => version.trim_start_matches(|c: char| c.is_ascii_digit() || c == '.'),
        None => rest.strip_prefix('.').unwrap_or_default(),
    };
    (rest == "so" || rest.starts_with("so.")) && path.is_file()
}

fn on_path(program: &str) -> bool {
    use std::os::unix::fs::PermissionsExt;
    let runs = |path: PathBuf| {
        path.metadata().is_ok_and(|data| data.is_file() && data.permissions().mode() & 0o111 != 0)
    };
    if program.contains('/') {
        return runs(PathBuf::from(program));
    }
    let path = env::var_os("PATH").unwrap_or_default();
    env::split_paths(&path).any(|folder| runs(folder.join(program)))
}

#[cfg(test)]
mod tests {
    use super::*;

    const ALL: Means = Means { agreed: true, terminal: true, apt: true, root: true, sudo: true };

    #[test]
    fn nothing_is_installed_without_agreement() {
        assert_eq!(decide(ALL), Decision::Install);
        assert_eq!(decide(Means { agreed: false, ..ALL }), Decision::Ask);
        assert_eq!(decide(Means { agreed: false, terminal: false, ..ALL }), Decision::Tell);
        assert_eq!(decide(Means { root: false, ..ALL }), Decision::Install);
        assert_eq!(decide(Means { root: false, sudo: false, ..ALL }), Decision::Tell);
        assert_eq!(decide(Means { apt: false, ..ALL }), Decision::Tell);
    }

    #[test]
    fn one_command_names_each_package_once() {
        let needs = [Need::Mpi, Need::OpenMpiHeaders, Need::Cxx];
        assert_eq!(
            install_words(&needs, false).join(" "),
            "sudo apt-get install --yes --no-install-recommends g++ libopenmpi-dev openmpi-bin"
        );
        assert_eq!(install_words(&needs, true)[0], "apt-get");
    }

    #[test]
    fn libclang_is_told_by_its_name() {
        let folder = tempfile::tempdir().unwrap();
        for (name, is) in [
            ("libclang.so", true),
            ("libclang.so.14", true),
            ("libclang-14.so.1", true),
            ("libclang-14.0.6.so", true),
            ("libclang-cpp.so.14", false),
            ("libclangAST.a", false),
        ] {
            let path = folder.path().join(name);
            fs::write(&path, "").unwrap();
            assert_eq!(is_libclang(&path), is, "{name}");
        }
        assert!(holds_libclang(folder.path()));
    }
}
