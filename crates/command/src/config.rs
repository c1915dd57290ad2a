use std::collections::BTreeMap;
use std::fs;
use std::io::{self, Write};
use std::path::Path;

use serde::Serialize;
use serde::de::DeserializeOwned;
use toml::{Table, Value};

use crate::{Common, Error, Result};

/// Below this Jaro-Winkler similarity a suggestion confuses more than it helps; clap uses 0.7 for
/// short flags, our keys share long prefixes.
const SIMILAR: f64 = 0.85;

/// Lays the flags of a subcommand over its table in the file of `--config`.
///
/// The file has one table per subcommand; `known_subcommands` are the tables it may have. A key is
/// the name of a flag or one of its aliases, in snake_case or kebab-case. Relative paths in the
/// file are relative to the working directory, as on the command line.
///
/// `A` has only `Option` and `Vec` fields (absent and empty mean "not given"), its serde names are
/// its field names, and it has `#[serde(default)]`.
///
/// # Errors
/// [`Error::ReadConfig`] where the file cannot be read; [`Error::Config`] naming the file and each
/// unknown table, unknown key, key given twice and value of a wrong type; [`Error::Usage`] where a
/// flag's value cannot be expressed in TOML.
pub fn layered<A>(
    subcommand: &str,
    known_subcommands: &[&str],
    flags: A,
    common: &Common,
) -> Result<A>
where
    A: clap::Args + Serialize + DeserializeOwned,
{
    let Some(path) = &common.config else {
        return Ok(flags);
    };
    let mut settings = read_table::<A>(path, subcommand, known_subcommands)?;
    settings.extend(given(&flags)?);
    A::deserialize_from(settings).map_err(|message| Error::Config { path: path.clone(), message })
}

/// Prints resolved settings as the TOML table `[subcommand]` to stdout, ready for `--config`.
///
/// # Errors
/// [`Error::PrintConfig`] where a value has no TOML form or stdout is closed.
pub fn print_config(subcommand: &str, resolved: &impl Serialize) -> Result<()> {
    let text = config_text(subcommand, resolved)?;
    io::stdout()
        .write_all(text.as_bytes())
        .map_err(|error| Error::PrintConfig { message: error.to_string() })
}

fn config_text(subcommand: &str, resolved: &impl Serialize) -> Result<String> {
    let print_error = |message: String| Error::PrintConfig { message };
    let settings = Table::try_from(resolved).map_err(|error| print_error(error.to_string()))?;
    let file = BTreeMap::from([(subcommand, settings)]);
    toml::to_string_pretty(&file).map_err(|error| print_error(error.to_string()))
}

/// The value of a setting that has no default.
///
/// # Errors
/// [`Error::Usage`] naming the flag and the key where it was not given.
pub fn required<T>(value: Option<T>, name: &str) -> Result<T> {
    value.ok_or_else(|| {
        let flag = name.replace('_', "-");
        let key = name.replace('-', "_");
        Error::usage(format!("--{flag} is required (or the key {key} in the --config file)"))
    })
}

/// Warns, in one line, of the flags that were given and have no meaning here.
///
/// `flags` is a struct of the flags that Dromedary's launcher scripts pass to libraries we do not
/// have (`--ddp_backend nccl`): accepting them lets those scripts run. Returns their names.
///
/// # Errors
/// [`Error::Usage`] where a value cannot be expressed in TOML.
pub fn ignored_flags(flags: &impl Serialize) -> Result<Vec<String>> {
    let names: Vec<String> =
        given(flags)?.keys().map(|key| format!("--{}", key.replace('_', "-"))).collect();
    if !names.is_empty() {
        tracing::warn!("these flags have no meaning here and are ignored: {}", names.join(", "));
    }
    Ok(names)
}

/// The settings that were given: absent options and empty lists are left out.
fn given(flags: &impl Serialize) -> Result<Table> {
    let mut table = Table::try_from(flags)
        .map_err(|error| Error::usage(format!("a flag has no form in TOML: {error}")))?;
    table.retain(|_, value| !matches!(value, Value::Array(items) if items.is_empty()));
    Ok(table)
}

fn read_table<A>(path: &Path, subcommand: &str, known_subcommands: &[&str]) -> Result<Table>
where
    A: clap::Args + DeserializeOwned,
{
    let config_error = |message: String| Error::Config { path: path.to_owned(), message };
    let text = fs::read_to_string(path)
        .map_err(|source| Error::ReadConfig { path: path.to_owned(), source })?;
    let mut file: Table =
        text.parse().map_err(|error: toml::de::Error| config_error(error.to_string()))?;
    check_tables(&file, known_subcommands).map_err(config_error)?;
    match file.remove(subcommand) {
        Some(Value::Table(table)) => checked_keys::<A>(table)
            .map_err(|problems| config_error(format!("[{subcommand}]: {problems}"))),
        _ => Ok(Table::new()),
    }
}

fn check_tables(file: &Table, known_subcommands: &[&str]) -> std::result::Result<(), String> {
    let known = || known_subcommands.iter().map(|name| format!("[{name}]")).collect::<Vec<_>>();
    for (name, value) in file {
        if !value.is_table() {
            return Err(format!(
                "the key {name} stands outside a table; expected tables: {}",
                known().join(", ")
            ));
        }
        if !known_subcommands.contains(&name.as_str()) {
            return Err(format!("unknown table [{name}]; expected one of {}", known().join(", ")));
        }
    }
    Ok(())
}

/// Resolves aliases and kebab-case to field names and tries each value on its own, so that one
/// message lists all problems by key.
fn checked_keys<A>(table: Table) -> std::result::Result<Table, String>
where
    A: clap::Args + DeserializeOwned,
{
    let fields = field_of_key::<A>();
    let mut settings = Table::new();
    let mut problems = Vec::new();
    for (key, value) in table {
        let Some(field) = fields.get(&key.replace('-', "_")) else {
            problems.push(unknown_key(&key, &fields));
            continue;
        };
        let alone = Table::from_iter([(field.clone(), value.clone())]);
        if let Err(message) = A::deserialize_from(alone) {
            problems.push(format!("key {key}: {message}"));
        } else if settings.insert(field.clone(), value).is_some() {
            problems.push(format!("key {key} sets {field} a second time"));
        }
    }
    if problems.is_empty() { Ok(settings) } else { Err(problems.join("; ")) }
}

fn unknown_key(key: &str, fields: &BTreeMap<String, String>) -> String {
    let snake = key.replace('-', "_");
    let similarity = |name: &String| strsim::jaro_winkler(name, &snake);
    let nearest = fields.keys().max_by(|one, other| similarity(one).total_cmp(&similarity(other)));
    match nearest {
        Some(name) if similarity(name) >= SIMILAR => {
            format!("unknown key {key}, did you mean {name}?")
        }
        _ => format!("unknown key {key}"),
    }
}

/// From each name of a flag, in snake_case, to the field that holds it.
fn field_of_key<A: clap::Args>() -> BTreeMap<String, String> {
    let command = A::augment_args(clap::Command::new("keys"));
    let mut fields = BTreeMap::new();
    for arg in command.get_arguments() {
        let field = arg.get_id().to_string();
        let long = arg.get_long().into_iter();
        for name in long.chain(arg.get_all_aliases().unwrap_or_default()) {
            fields.insert(name.replace('-', "_"), field.clone());
        }
        fields.insert(field.clone(), field);
    }
    fields
}

/// Deserialisation from a table with a one-line message.
trait FromTable: Sized {
    fn deserialize_from(table: Table) -> std::result::Result<Self, String>;
}

impl<A: DeserializeOwned> FromTable for A {
    fn deserialize_from(table: Table) -> std::result::Result<Self, String> {
        table.try_into().map_err(|error: toml::de::Error| error.message().to_owned())
    }
}

#[cfg(test)]
mod tests {
    use super::*;
    use std::path::PathBuf;

    #[derive(Debug, Default, PartialEq, clap::Args, Serialize, serde::Deserialize)]
    #[serde(default, deny_unknown_fields)]
    struct GenerateArgs {
        #[arg(long, alias = "ckpt-dir")]
        checkpoint: Option<PathBuf>,
        #[arg(long)]
        max_gen_len: Option<usize>,
        #[arg(long)]
        temperature: Option<f64>,
        #[arg(long, value_delimiter = ',')]
        data_files: Vec<PathBuf>,
        #[arg(long)]
        seed: Option<u64>,
    }

    fn with_file(text: &str, flags: GenerateArgs) -> Result<GenerateArgs> {
        let folder = tempfile::tempdir().unwrap();
        let path = folder.path().join("run.toml");
        fs::write(&path, text).unwrap();
        let common = Common { config: Some(path), ..Common::default() };
        layered("generate", &["generate", "train"], flags, &common)
    }

    fn message(text: &str) -> String {
        let error = with_file(text, GenerateArgs::default()).unwrap_err();
        assert!(error.to_string().contains("run.toml"), "{error}");
        error.to_string()
    }

    #[test]
    fn flags_win_over_the_file() {
        let flags = GenerateArgs { temperature: Some(0.0), ..GenerateArgs::default() };
        let file = "[generate]\ntemperature = 0.7\nmax_gen_len = 512\n[train]\nanything = 1\n";
        let args = with_file(file, flags).unwrap();
        assert_eq!(args.temperature, Some(0.0));
        assert_eq!(args.max_gen_len, Some(512));
        assert_eq!(args.checkpoint, None);
    }

    #[test]
    fn a_list_of_the_flags_replaces_that_of_the_file() {
        let file = "[generate]\ndata_files = ['a', 'b']\n";
        let flags = GenerateArgs { data_files: vec!["c".into()], ..GenerateArgs::default() };
        assert_eq!(with_file(file, flags).unwrap().data_files, [PathBuf::from("c")]);
        let args = with_file(file, GenerateArgs::default()).unwrap();
        assert_eq!(args.data_files, [PathBuf::from("a"), PathBuf::from("b")]);
    }

    #[test]
    fn keys_may_be_kebab_case_and_aliases() {
        let args = with_file("[generate]\nmax-gen-len = 3\nckpt_dir = 'm'\n", Default::default());
        let args = args.unwrap();
        assert_eq!(args.max_gen_len, Some(3));
        assert_eq!(args.checkpoint, Some("m".into()));
    }

    #[test]
    fn all_problems_are_named_at_once() {
        let text = message("[generate]\nmax_gen_length = 3\nxyz = 1\ntemperature = 'hot'\n");
        assert!(text.contains("unknown key max_gen_length, did you mean max_gen_len?"), "{text}");
        assert!(text.ends_with("unknown key xyz"), "{text}");
        assert!(text.contains("key temperature: invalid type"), "{text}");
    }

    #[test]
    fn a_key_under_two_names_is_an_error() {
        let text = message("[generate]\ncheckpoint = 'a'\nckpt_dir = 'b'\n");
        assert!(text.contains("sets checkpoint a second time"), "{text}");
    }

    #[test]
    fn unknown_tables_and_loose_keys_are_errors() {
        assert!(message("[genrate]\nseed = 1\n").contains("unknown table [genrate]"));
        assert!(message("seed = 1\n").contains("the key seed stands outside a table"));
        assert!(message("generate = 1\n").contains("the key generate stands outside a table"));
    }

    #[test]
    fn syntax_errors_name_the_line() {
        assert!(message("[generate]\nseed = \n").contains("line 2"));
    }

    #[test]
    fn a_missing_file_is_named() {
        let common = Common { config: Some("/nowhere/x.toml".into()), ..Common::default() };
        let error = layered("generate", &[], GenerateArgs::default(), &common).unwrap_err();
        assert!(matches!(error, Error::ReadConfig { .. }));
        assert!(error.to_string().contains("/nowhere/x.toml"));
    }

    #[test]
    fn a_value_without_a_toml_form_is_an_error_not_a_loss() {
        let flags = GenerateArgs { seed: Some(u64::MAX), ..GenerateArgs::default() };
        let error = with_file("[generate]\n", flags).unwrap_err();
        assert!(matches!(error, Error::Usage { .. }), "{error}");
    }

    #[test]
    fn what_is_printed_can_be_read_again() {
        let args = GenerateArgs {
            checkpoint: Some("a b".into()),
            temperature: Some(0.7),
            data_files: vec!["x".into()],
            ..GenerateArgs::default()
        };
        let text = config_text("generate", &args).unwrap();
        assert_eq!(with_file(&text, GenerateArgs::default()).unwrap(), args);
    }

    #[test]
    fn required_names_flag_and_key() {
        let error = required::<u32>(None, "input_file").unwrap_err().to_string();
        assert!(error.contains("--input-file") && error.contains("input_file"), "{error}");
        assert_eq!(required(Some(1), "x").unwrap(), 1);
    }

    #[test]
    fn ignored_flags_are_those_given() {
        let flags = GenerateArgs { seed: Some(1), max_gen_len: Some(2), ..Default::default() };
        assert_eq!(ignored_flags(&flags).unwrap(), ["--max-gen-len", "--seed"]);
        assert!(ignored_flags(&GenerateArgs::default()).unwrap().is_empty());
    }
}
