//! `setup`: what it starts, and what it does not.

use std::{fs, path::Path};

use crate::machine::{Machine, errors};

#[test]
fn a_machine_that_is_ready_gets_nothing() {
    let machine = Machine::ready();
    let first = machine.xtask(&["setup", "--yes"], &[]);
    assert!(first.status.success(), "{}", errors(&first));
    let link = machine.path("checkout/.libtorch");
    assert_eq!(fs::read_link(&link).unwrap(), machine.path("cache/libtorch-2.13.0-cpu"));
    let second = machine.xtask(&["setup", "--yes"], &[("LIBTORCH", &link)]);
    assert!(second.status.success(), "{}", errors(&second));
    assert_eq!(machine.called(), "", "no download, no apt, no build");
    assert_eq!(String::from_utf8_lossy(&second.stdout), "");
}

#[test]
fn without_agreement_the_one_command_is_named() {
    let machine = Machine::empty();
    let output = machine.xtask(&["setup"], &[]);
    assert_eq!(output.status.code(), Some(2), "{}", errors(&output));
    let command = "apt-get install --yes --no-install-recommends \
                   chromium fonts-dejavu-core g++ libclang-dev libopenmpi-dev make openmpi-bin \
                   pkg-config";
    assert!(errors(&output).contains(command), "{}", errors(&output));
    assert_eq!(machine.called(), "");
    let lacking = String::from_utf8_lossy(&output.stdout).into_owned();
    for what in ["MPI with headers", "libclang", "g++", "make", "pkg-config", "Chromium"] {
        assert!(lacking.contains(&format!("lacking: {what}")), "{lacking}");
    }
}

#[test]
fn with_agreement_apt_installs_exactly_what_is_lacking() {
    for (arguments, variables) in
        [(&["setup", "--yes"][..], &[][..]), (&["setup"], &[("CI", Path::new("true"))][..])]
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
        let output = machine.xtask(arguments, variables);
        assert!(output.status.success(), "{}", errors(&output));
        let install = "apt-get install --yes --no-install-recommends make\n";
        assert!(machine.called().starts_with("apt-get update"), "{}", machine.called());
        assert!(machine.called().ends_with(install), "{}", machine.called());
    }
}

#[test]
fn a_browser_is_installed_for_tests_and_missed_by_them_alone() {
    let machine = Machine::ready();
    fs::remove_file(machine.path("bin/chromium")).unwrap();
    let output = machine.xtask(&["setup"], &[]);
    assert!(output.status.success(), "{}", errors(&output));
    let said = String::from_utf8_lossy(&output.stdout).into_owned();
    let command = "apt-get install --yes --no-install-recommends chromium fonts-dejavu-core";
    assert!(said.contains("lacking: Chromium") && said.contains(command), "{said}");
    assert_eq!(machine.called(), "");

    let script = format!(
        "echo \"apt-get $*\" >> {}; [ $1 = update ] || echo > {bin}/chromium; exit 0",
        machine.calls(),
        bin = machine.path("bin").display()
    );
    machine.program("apt-get", &script);
    machine.program("sudo", "[ $1 = -n ] && shift; exec \"$@\"");
    let output = machine.xtask(&["setup", "--yes"], &[]);
    assert!(output.status.success(), "{}", errors(&output));
    let install = "install --yes --no-install-recommends chromium fonts-dejavu-core";
    assert!(machine.called().contains(install), "{}", machine.called());
}

#[test]
fn an_installation_that_brings_too_little_is_an_error() {
    let machine = Machine::ready();
    fs::remove_file(machine.path("bin/make")).unwrap();
    machine.program("apt-get", "exit 0");
    machine.program("sudo", "[ $1 = -n ] && shift; exec \"$@\"");
    let output = machine.xtask(&["setup", "--yes"], &[]);
    assert_eq!(output.status.code(), Some(1));
    assert!(errors(&output).contains("still lacking: make"), "{}", errors(&output));
}

#[test]
fn without_apt_the_lacking_things_are_named() {
    let machine = Machine::ready();
    fs::remove_file(machine.path("bin/apt-get")).unwrap();
    fs::remove_file(machine.path("bin/make")).unwrap();
    let output = machine.xtask(&["setup", "--yes"], &[]);
    assert_eq!(output.status.code(), Some(2));
    let text = errors(&output);
    assert!(text.contains("lacks make") && text.contains("no apt-get"), "{text}");
}

#[test]
fn a_programs_only_mpi_gets_its_own_headers() {
    let machine = Machine::ready();
    machine.program("mpicc", "exit 1");
    machine.program("mpirun", "echo 'mpirun (Open MPI) 4.1.4'");
    let text = errors(&machine.xtask(&["setup"], &[]));
    assert!(text.ends_with("--no-install-recommends libopenmpi-dev\n"), "{text}");
    machine.program("mpirun", "echo 'HYDRA build details:'");
    let text = errors(&machine.xtask(&["setup"], &[]));
    assert!(text.ends_with("--no-install-recommends libmpich-dev\n"), "{text}");
}

#[test]
fn a_libtorch_of_the_users_is_taken_when_its_version_fits() {
    let machine = Machine::ready();
    fs::remove_dir_all(machine.path("cache")).unwrap();
    machine.file("own/build-version");
    let output = machine.xtask(&["setup"], &[("LIBTORCH", &machine.path("own"))]);
    assert!(output.status.success(), "{}", errors(&output));
    assert_eq!(fs::read_link(machine.path("checkout/.libtorch")).unwrap(), machine.path("own"));
    assert_eq!(machine.called(), "");
    assert!(!machine.path("cache").exists());

    fs::write(machine.path("own/build-version"), "2.12.0+cpu").unwrap();
    let output = machine.xtask(&["setup"], &[("LIBTORCH", &machine.path("own"))]);
    assert_eq!(output.status.code(), Some(1));
    let text = errors(&output);
    assert!(text.contains("2.12.0") && text.contains("2.13.0"), "{text}");

    let output = machine.xtask(&["setup"], &[("LIBTORCH", &machine.path("nowhere"))]);
    assert!(errors(&output).contains("no libtorch in"), "{}", errors(&output));
    let output = machine.xtask(&["setup"], &[("LIBTORCH", Path::new(""))]);
    assert!(errors(&output).contains("LIBTORCH is set, but empty"), "{}", errors(&output));
}

#[test]
fn pythons_torch_is_taken_when_its_version_fits() {
    let machine = Machine::ready();
    let use_python = [("LIBTORCH_USE_PYTORCH", Path::new("1"))];
    let torch = machine.path("cache/libtorch-2.13.0-cpu");
    machine.program("python3", &format!("echo 2.13.0+cu130 {}", torch.display()));
    let output = machine.xtask(&["setup"], &use_python);
    assert!(output.status.success(), "{}", errors(&output));
    assert_eq!(fs::read_link(machine.path("checkout/.libtorch")).unwrap(), torch);
    machine.program("python3", "echo 2.12.1 /some/where");
    let text = errors(&machine.xtask(&["setup"], &use_python));
    assert!(text.contains("2.12.1") && text.contains("2.13.0"), "{text}");
    machine.program("python3", "echo \"No module named 'torch'\" >&2; exit 1");
    let text = errors(&machine.xtask(&["setup"], &use_python));
    assert!(text.contains("LIBTORCH_USE_PYTORCH") && text.contains("No module"), "{text}");
}

#[test]
fn a_missing_pip_is_named() {
    let machine = Machine::ready();
    fs::remove_dir_all(machine.path("cache")).unwrap();
    machine.program("python3", "[ \"$1\" = -c ]");
    let output = machine.xtask(&["setup", "--yes"], &[]);
    assert_eq!(output.status.code(), Some(1));
    assert!(errors(&output).contains("python3-pip"), "{}", errors(&output));
    assert!(!machine.path("checkout/.libtorch").exists());
}
