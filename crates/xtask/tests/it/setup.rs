//! `setup` on machines made of shims: what it starts, and what it does not.

use std::{
    fs,
    os::unix::fs::PermissionsExt,
    path::{Path, PathBuf},
    process::{Command, Output, Stdio},
};

use tempfile::TempDir;

/// A machine: a PATH, a checkout and a cache of its own.
struct Machine {
    folder: TempDir,
}

impl Machine {
    /// Has nothing but programs that note that they were called, and fail.
    fn empty() -> Self {
        let machine = Self { folder: tempfile::tempdir().unwrap() };
        for name in ["apt-get", "cargo", "npm", "pip", "pip3", "python3", "sudo"] {
            machine.program(name, &format!("echo \"{name} $*\" >> {}; exit 1", machine.calls()));
        }
        // How commands get their variables.
        std::os::unix::fs::symlink("/usr/bin/env", machine.path("bin/env")).unwrap();
        fs::create_dir_all(machine.path("checkout/crates/xtask")).unwrap();
        fs::write(machine.path("checkout/Cargo.toml"), "").unwrap();
        machine
    }

    /// Has everything that setup provides.
    fn ready() -> Self {
        let machine = Self::empty();
        for name in ["c++", "make", "mpicc", "mpirun", "pkg-config"] {
            machine.program(name, "exit 0");
        }
        machine.file("libclang/libclang.so");
        let libtorch = "cache/libtorch-2.13.0-cpu";
        for library in [
            "libc10.so",
            "libcudart.so.13",
            "libcupti.so.13",
            "libgomp.so.1",
            "libtorch.so",
            "libtorch_cpu.so",
        ] {
            machine.file(&format!("{libtorch}/lib/{library}"));
        }
        machine.file(&format!("{libtorch}/include/ATen/ATen.h"));
        machine.file(&format!("{libtorch}/build-version"));
        machine
    }

    fn path(&self, name: &str) -> PathBuf {
        self.folder.path().join(name)
    }

    fn calls(&self) -> String {
        self.path("calls").display().to_string()
    }

    fn called(&self) -> String {
        fs::read_to_string(self.path("calls")).unwrap_or_default()
    }

    fn file(&self, name: &str) {
        let path = self.path(name);
        fs::create_dir_all(path.parent().unwrap()).unwrap();
        fs::write(path, "2.13.0").unwrap();
    }

    fn program(&self, name: &str, script: &str) {
        self.file(&format!("bin/{name}"));
        let path = self.path(&format!("bin/{name}"));
        fs::write(&path, format!("#!/bin/sh\n{script}\n")).unwrap();
        fs::set_permissions(path, fs::Permissions::from_mode(0o755)).unwrap();
    }

    fn setup(&self, arguments: &[&str], variables: &[(&str, &Path)]) -> Output {
        Command::new(env!("CARGO_BIN_EXE_xtask"))
            .arg("setup")
            .args(arguments)
            .env_clear()
            .env("PATH", self.path("bin"))
            .env("CARGO_MANIFEST_DIR", self.path("checkout/crates/xtask"))
            .env("DROMEDARY_CACHE", self.path("cache"))
            .env("LIBCLANG_PATH", self.path("libclang"))
            .envs(variables.iter().copied())
            .stdin(Stdio::null())
            .output()
            .unwrap()
    }
}

fn errors(output: &Output) -> String {
    String::from_utf8_lossy(&output.stderr).into_owned()
}

#[test]
fn a_machine_that_is_ready_gets_nothing() {
    let machine = Machine::ready();
    let first = machine.setup(&["--yes"], &[]);
    assert!(first.status.success(), "{}", errors(&first));
    let link = machine.path("checkout/.libtorch");
    assert_eq!(fs::read_link(&link).unwrap(), machine.path("cache/libtorch-2.13.0-cpu"));
    let second = machine.setup(&["--yes"], &[("LIBTORCH", &link)]);
    assert!(second.status.success(), "{}", errors(&second));
    assert_eq!(machine.called(), "", "no download, no apt, no build");
    assert_eq!(String::from_utf8_lossy(&second.stdout), "");
}

#[test]
fn without_agreement_the_one_command_is_named() {
    let machine = Machine::empty();
    let output = machine.setup(&[], &[]);
    assert_eq!(output.status.code(), Some(2), "{}", errors(&output));
    let command = "apt-get install --yes --no-install-recommends \
                   g++ libclang-dev libopenmpi-dev make openmpi-bin pkg-config";
    assert!(errors(&output).contains(command), "{}", errors(&output));
    assert_eq!(machine.called(), "");
    let lacking = String::from_utf8_lossy(&output.stdout).into_owned();
    for what in ["MPI with headers", "libclang", "g++", "make", "pkg-config"] {
        assert!(lacking.contains(&format!("lacking: {what}")), "{lacking}");
    }
}

#[test]
fn with_agreement_apt_installs_exactly_what_is_lacking() {
    for (arguments, variables) in
        [(&["--yes"][..], &[][..]), (&[], &[("CI", Path::new("true"))][..])]
    {
        let machine = Machine::ready();
        fs::remove_file(machine.path("bin/make")).unwrap();
        let script = format!(
            "echo \"apt-get $1 $2 $3 $4\" >> {}; [ $1 = update ] || echo 'exit 0' > {bin}/make; \
             /bin/chmod -f +x {bin}/make; exit 0",
            machine.calls(),
            bin = machine.path("bin").display()
        );
        machine.program("apt-get", &script);
        machine.program("sudo", "[ $1 = -n ] && shift; exec \"$@\"");
        let output = machine.setup(arguments, variables);
        assert!(output.status.success(), "{}", errors(&output));
        let install = "apt-get install --yes --no-install-recommends make\n";
        assert!(machine.called().starts_with("apt-get update"), "{}", machine.called());
        assert!(machine.called().ends_with(install), "{}", machine.called());
    }
}

#[test]
fn an_installation_that_brings_too_little_is_an_error() {
    let machine = Machine::ready();
    fs::remove_file(machine.path("bin/make")).unwrap();
    machine.program("apt-get", "exit 0");
    machine.program("sudo", "[ $1 = -n ] && shift; exec \"$@\"");
    let output = machine.setup(&["--yes"], &[]);
    assert_eq!(output.status.code(), Some(1));
    assert!(errors(&output).contains("still lacking: make"), "{}", errors(&output));
}

#[test]
fn without_apt_the_lacking_things_are_named() {
    let machine = Machine::ready();
    fs::remove_file(machine.path("bin/apt-get")).unwrap();
    fs::remove_file(machine.path("bin/make")).unwrap();
    let output = machine.setup(&["--yes"], &[]);
    assert_eq!(output.status.code(), Some(2));
    let text = errors(&output);
    assert!(text.contains("lacks make") && text.contains("no apt-get"), "{text}");
}

#[test]
fn a_programs_only_mpi_gets_its_own_headers() {
    let machine = Machine::ready();
    machine.program("mpicc", "exit 1");
    machine.program("mpirun", "echo 'mpirun (Open MPI) 4.1.4'");
    let text = errors(&machine.setup(&[], &[]));
    assert!(text.ends_with("--no-install-recommends libopenmpi-dev\n"), "{text}");
    machine.program("mpirun", "echo 'HYDRA build details:'");
    let text = errors(&machine.setup(&[], &[]));
    assert!(text.ends_with("--no-install-recommends libmpich-dev\n"), "{text}");
}

#[test]
fn a_libtorch_of_the_users_is_taken_when_its_version_fits() {
    let machine = Machine::ready();
    fs::remove_dir_all(machine.path("cache")).unwrap();
    machine.file("own/build-version");
    let output = machine.setup(&[], &[("LIBTORCH", &machine.path("own"))]);
    assert!(output.status.success(), "{}", errors(&output));
    assert_eq!(fs::read_link(machine.path("checkout/.libtorch")).unwrap(), machine.path("own"));
    assert_eq!(machine.called(), "");
    assert!(!machine.path("cache").exists());

    fs::write(machine.path("own/build-version"), "2.12.0+cpu").unwrap();
    let output = machine.setup(&[], &[("LIBTORCH", &machine.path("own"))]);
    assert_eq!(output.status.code(), Some(1));
    let text = errors(&output);
    assert!(text.contains("2.12.0") && text.contains("2.13.0"), "{text}");

    let output = machine.setup(&[], &[("LIBTORCH", &machine.path("nowhere"))]);
    assert!(errors(&output).contains("no libtorch in"), "{}", errors(&output));
    let output = machine.setup(&[], &[("LIBTORCH", Path::new(""))]);
    assert!(errors(&output).contains("LIBTORCH is set, but empty"), "{}", errors(&output));
}

#[test]
fn pythons_torch_is_taken_when_its_version_fits() {
    let machine = Machine::ready();
    let use_python = [("LIBTORCH_USE_PYTORCH", Path::new("1"))];
    let torch = machine.path("cache/libtorch-2.13.0-cpu");
    machine.program("python3", &format!("echo 2.13.0+cu130 {}", torch.display()));
    let output = machine.setup(&[], &use_python);
    assert!(output.status.success(), "{}", errors(&output));
    assert_eq!(fs::read_link(machine.path("checkout/.libtorch")).unwrap(), torch);
    machine.program("python3", "echo 2.12.1 /some/where");
    let text = errors(&machine.setup(&[], &use_python));
    assert!(text.contains("2.12.1") && text.contains("2.13.0"), "{text}");
    machine.program("python3", "echo \"No module named 'torch'\" >&2; exit 1");
    let text = errors(&machine.setup(&[], &use_python));
    assert!(text.contains("LIBTORCH_USE_PYTORCH") && text.contains("No module"), "{text}");
}

#[test]
fn a_missing_pip_is_named() {
    let machine = Machine::ready();
    fs::remove_dir_all(machine.path("cache")).unwrap();
    machine.program("python3", "[ \"$1\" = -c ]");
    let output = machine.setup(&["--yes"], &[]);
    assert_eq!(output.status.code(), Some(1));
    assert!(errors(&output).contains("python3-pip"), "{}", errors(&output));
    assert!(!machine.path("checkout/.libtorch").exists());
}
