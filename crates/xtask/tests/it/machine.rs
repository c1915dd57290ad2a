//! A machine made of shims: a PATH, a checkout and a cache of its own.

use std::{
    fs,
    os::unix::fs::PermissionsExt,
    path::{Path, PathBuf},
    process::{Command, Output, Stdio},
};

use tempfile::TempDir;

/// A machine: a PATH, a checkout and a cache of its own.
pub(crate) struct Machine {
    folder: TempDir,
}

impl Machine {
    /// Has nothing but programs that note that they were called, and fail.
    pub(crate) fn empty() -> Self {
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
    pub(crate) fn ready() -> Self {
        let machine = Self::empty();
        for name in ["c++", "chromium", "make", "mpicc", "mpirun", "pkg-config"] {
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

    /// Has the model, too.
    pub(crate) fn model(&self) {
        for file in [
            "config.json",
            "generation_config.json",
            "model.safetensors",
            "tokenizer.json",
            "tokenizer_config.json",
        ] {
            self.file(&format!("cache/models/smollm2-135m-instruct/{file}"));
        }
    }

    pub(crate) fn path(&self, name: &str) -> PathBuf {
        self.folder.path().join(name)
    }

    pub(crate) fn calls(&self) -> String {
        self.path("calls").display().to_string()
    }

    pub(crate) fn called(&self) -> String {
        fs::read_to_string(self.path("calls")).unwrap_or_default()
    }

    pub(crate) fn file(&self, name: &str) {
        let path = self.path(name);
        fs::create_dir_all(path.parent().unwrap()).unwrap();
        fs::write(path, "2.13.0").unwrap();
    }

    pub(crate) fn program(&self, name: &str, script: &str) {
        self.file(&format!("bin/{name}"));
        let path = self.path(&format!("bin/{name}"));
        fs::write(&path, format!("#!/bin/sh\n{script}\n")).unwrap();
        fs::set_permissions(path, fs::Permissions::from_mode(0o755)).unwrap();
    }

    /// `xtask ARGUMENTS` on this machine.
    pub(crate) fn xtask(&self, arguments: &[&str], variables: &[(&str, &Path)]) -> Output {
        Command::new(env!("CARGO_BIN_EXE_xtask"))
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

/// What a program wrote to standard error.
pub(crate) fn errors(output: &Output) -> String {
    String::from_utf8_lossy(&output.stderr).into_owned()
}
