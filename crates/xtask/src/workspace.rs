//! The checkout, and cargo run inside it as a user would run it.

use std::{
    env,
    ffi::{OsStr, OsString},
    path::{Path, PathBuf},
    process::{Command, Stdio},
};

use anyhow::{Context, Result, ensure};

/// The checkout that this xtask belongs to.
#[derive(Debug, Clone)]
pub(crate) struct Workspace {
    root: PathBuf,
}

impl Workspace {
    /// The checkout whose cargo started this program.
    ///
    /// Asked at run time first: several checkouts may share one target folder, and with it this
    /// program.
    pub(crate) fn find() -> Result<Self> {
        let package = env::var_os("CARGO_MANIFEST_DIR")
            .map_or_else(|| PathBuf::from(env!("CARGO_MANIFEST_DIR")), PathBuf::from);
        let root = package
            .ancestors()
            .nth(2)
            .filter(|root| root.join("Cargo.toml").is_file())
            .with_context(|| format!("no checkout around {}", package.display()))?;
        Ok(Self { root: root.to_path_buf() })
    }

    /// The folder of the root `Cargo.toml`.
    pub(crate) fn root(&self) -> &Path {
        &self.root
    }

    /// The link that cargo's `[env]` table names as LIBTORCH.
    pub(crate) fn libtorch_link(&self) -> PathBuf {
        self.root.join(".libtorch")
    }

    /// LIBTORCH as the user set it; none where it only comes from `.cargo/config.toml`.
    pub(crate) fn users_libtorch(&self) -> Option<OsString> {
        env::var_os("LIBTORCH").filter(|value| Path::new(value) != self.libtorch_link())
    }

    /// A program started in the checkout as from a user's shell: without what `cargo run` added to
    /// this process' environment, which could rebuild packages or hide a missing rpath.
    pub(crate) fn command(&self, program: impl AsRef<OsStr>) -> Command {
        let mut command = Command::new(program);
        command.stdin(Stdio::null());
        for (name, _) in env::vars_os() {
            if name.to_str().is_some_and(is_from_cargo_run) {
                command.env_remove(name);
            }
        }
        if self.users_libtorch().is_none() {
            command.env_remove("LIBTORCH");
        }
        if let Some(path) = env::var_os("LD_LIBRARY_PATH") {
            match without_cargos_folders(&path) {
                Some(path) => command.env("LD_LIBRARY_PATH", path),
                None => command.env_remove("LD_LIBRARY_PATH"),
            };
        }
        command
    }

    /// `cargo ARGUMENTS` in the checkout.
    pub(crate) fn cargo<A: AsRef<OsStr>>(&self, arguments: impl IntoIterator<Item = A>) -> Command {
        let mut command = self.command("cargo");
        command.args(arguments).current_dir(&self.root);
        command
    }

    /// Where cargo builds (`CARGO_TARGET_DIR`, configuration, or `target`).
    pub(crate) fn target_dir(&self) -> Result<PathBuf> {
        let output = self
            .cargo(["metadata", "--no-deps", "--format-version", "1"])
            .output()
            .context("cannot start cargo")?;
        ensure!(
            output.status.success(),
            "cargo metadata failed: {}",
            String::from_utf8_lossy(&output.stderr)
        );
        let metadata: serde_json::Value = serde_json::from_slice(&output.stdout)?;
        let folder =
            metadata["target_directory"].as_str().context("cargo names no target folder")?;
        Ok(PathBuf::from(folder))
    }

    /// The folder of the built programs.
    pub(crate) fn programs(&self) -> Result<PathBuf> {
        Ok(self.target_dir()?.join("release"))
    }
}

/// `PATH` with `folder` first.
pub(crate) fn path_with(folder: &Path) -> Result<OsString> {
    let path = env::var_os("PATH").unwrap_or_default();
    let folders = std::iter::once(folder.to_path_buf()).chain(env::split_paths(&path));
    env::join_paths(folders).with_context(|| format!("{} cannot be on the PATH", folder.display()))
}

fn is_from_cargo_run(name: &str) -> bool {
    name.starts_with("CARGO_PKG_")
        || name.starts_with("CARGO_MANIFEST_")
        || matches!(name, "CARGO" | "CARGO_BIN_NAME" | "CARGO_CRATE_NAME" | "CARGO_PRIMARY_PACKAGE")
}

/// A library path without the folders that `cargo run` puts before it; none if nothing is left.
fn without_cargos_folders(path: &OsStr) -> Option<OsString> {
    let own = env::current_exe().ok().and_then(|program| program.parent().map(Path::to_path_buf));
    let kept: Vec<PathBuf> = env::split_paths(path)
        .filter(|folder| {
            let toolchain = folder
                .components()
                .any(|part| part.as_os_str() == "toolchains" || part.as_os_str() == "rustlib");
            let target = own.as_ref().is_some_and(|own| folder.starts_with(own));
            !toolchain && !target && !folder.as_os_str().is_empty()
        })
        .collect();
    (!kept.is_empty()).then(|| env::join_paths(kept).ok()).flatten()
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn cargos_library_folders_are_left_out() {
        let own = env::current_exe().unwrap();
        let own = own.parent().unwrap();
        let path = env::join_paths([
            own,
            Path::new("/home/u/.rustup/toolchains/stable/lib"),
            Path::new("/opt/cuda/lib"),
        ])
        .unwrap();
        assert_eq!(without_cargos_folders(&path).unwrap(), "/opt/cuda/lib");
        assert_eq!(without_cargos_folders(own.as_os_str()), None);
    }

    #[test]
    fn the_checkout_is_found() {
        let workspace = Workspace::find().unwrap();
        assert!(workspace.root().join("crates/xtask/Cargo.toml").is_file());
    }
}
