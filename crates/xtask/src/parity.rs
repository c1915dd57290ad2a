//! `cargo xtask parity`: our files and numbers against Hugging Face's libraries.

use std::{
    fs,
    path::{Path, PathBuf},
};

use anyhow::{Context, Result, ensure};

use crate::{
    cache::Cache,
    models,
    packages::Registries,
    python, setup,
    terminal::{self, Stage, say},
    workspace::{self, Workspace},
};

const FOLDER: &str = "crates/xtask/parity";
/// torch with the little of CUDA that is real; make_cuda_stubs.sh makes the rest.
const TORCH: [&str; 3] =
    ["torch==2.13.0", "nvidia-cuda-cupti==13.0.85", "nvidia-cuda-runtime==13.0.96"];
/// Wheels, their unpacked files and what the checks write.
const SPACE: u64 = 5_000 << 20;

/// Builds the programs and runs the comparison over them.
pub(crate) fn run(workspace: &Workspace, cache: &Cache) -> Result<()> {
    setup::run(workspace, cache, setup::Purpose::Build, false)?;
    let model = models::smollm2(workspace, cache, &Registries)?;
    let stage = Stage::start("build");
    terminal::run(&mut workspace.cargo(["build", "--release", "--workspace"]))?;
    stage.end();
    let environment = environment(workspace, cache)?;
    let stage = Stage::start("parity");
    let programs = workspace.programs()?;
    let mut check = workspace.command(environment.join("bin/python"));
    check
        .arg(workspace.root().join(FOLDER).join("check_parity.py"))
        .env("PATH", workspace::path_with(&programs)?)
        .env("DROMEDARY_SMOLLM2", &model)
        .env("HF_HUB_OFFLINE", "1")
        .env("PYTHONDONTWRITEBYTECODE", "1")
        .current_dir(workspace.root());
    terminal::run(&mut check)?;
    stage.end();
    Ok(())
}

/// The private environment with torch, transformers and peft; made anew when its requirements
/// change.
fn environment(workspace: &Workspace, cache: &Cache) -> Result<PathBuf> {
    let folder = cache.path("parity");
    let requirements = workspace.root().join(FOLDER).join("requirements.txt");
    let text = fs::read_to_string(&requirements)
        .with_context(|| format!("cannot read {}", requirements.display()))?;
    let version = python::ask("python3", "import sys; print(sys.version)")?;
    let recent = python::ask("python3", "import sys; print(sys.version_info >= (3, 11))")?;
    ensure!(recent == "True", "the libraries need Python 3.11 or newer; python3 is {version}");
    let wanted = format!("{version}\n{}\n{text}", TORCH.join("\n"));
    let made_for = folder.join("made-for.txt");
    let complete = || fs::read_to_string(&made_for).is_ok_and(|made_for| made_for == wanted);
    if complete() {
        return Ok(folder);
    }
    let _lock = cache.lock("parity")?;
    if complete() {
        return Ok(folder);
    }
    cache.need_space(SPACE, "the environment for parity")?;
    let stage = Stage::start("private Python environment");
    // A virtual environment holds its own path, so it is made in place; `made-for.txt` comes last
    // and says that it is complete.
    if folder.exists() {
        fs::remove_dir_all(&folder)
            .with_context(|| format!("cannot remove {}", folder.display()))?;
    }
    python::environment(&folder)?;
    say!("torch is 500 MB: this takes some minutes");
    terminal::run(python::pip_install(&folder).arg("--no-deps").args(TORCH))?;
    let stubs = workspace.root().join(FOLDER).join("make_cuda_stubs.sh");
    let packages = site_packages(&folder)?;
    terminal::run(workspace.command("bash").arg(stubs).arg(&packages))?;
    // All that is needed is in the list; with dependencies, torch's would bring CUDA.
    terminal::run(python::pip_install(&folder).args(["--no-deps", "-r"]).arg(&requirements))?;
    fs::write(&made_for, wanted).with_context(|| format!("cannot write {}", made_for.display()))?;
    stage.end();
    Ok(folder)
}

fn site_packages(environment: &Path) -> Result<PathBuf> {
    let lib = environment.join("lib");
    for entry in fs::read_dir(&lib).with_context(|| format!("cannot read {}", lib.display()))? {
        let packages = entry?.path().join("site-packages");
        if packages.is_dir() {
            return Ok(packages);
        }
    }
    ensure!(false, "no site-packages in {}", lib.display());
    Ok(lib)
}
