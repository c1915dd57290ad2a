//! Jinja as chat templates expect it: white space, filters and functions of transformers.

use std::fmt::Write as _;

use chrono::NaiveDate;
use minijinja::syntax::SyntaxConfig;
use minijinja::value::{Kwargs, ValueKind};
use minijinja::{AutoEscape, Environment, Error, ErrorKind, Value};
use regex::Regex;

/// Stand around what is written in a `{% generation %}` block: code points that are no characters.
pub(crate) const BLOCK_START: char = '\u{fdd0}';
pub(crate) const BLOCK_END: char = '\u{fdd1}';

/// The filter that takes the place of the block, which is an extension of transformers.
const GENERATION: &str = "generation_block";

/// An environment with the template `name` in it, and whether it has `{% generation %}` blocks.
pub(crate) fn environment(
    name: &'static str,
    source: &str,
    date: Option<&str>,
) -> Result<(Environment<'static>, bool), Error> {
    let mut environment = Environment::new();
    environment.set_syntax(SyntaxConfig::builder().trim_blocks(true).lstrip_blocks(true).build()?);
    environment.set_auto_escape_callback(|_| AutoEscape::None);
    environment.set_unknown_method_callback(minijinja_contrib::pycompat::unknown_method_callback);
    environment.add_filter("tojson", to_json);
    environment.add_filter(GENERATION, |body: String| format!("{BLOCK_START}{body}{BLOCK_END}"));
    environment.add_function("raise_exception", raise);
    if let Some(date) = date {
        let date = NaiveDate::parse_from_str(date, "%Y-%m-%d")
            .map_err(|error| invalid(format!("{date:?} is no date such as 2024-07-26: {error}")))?;
        environment.add_function("strftime_now", move |format: String| formatted(date, &format));
    }
    let (source, has_blocks) = with_filter_blocks(source);
    environment.add_template_owned(name, source)?;
    Ok((environment, has_blocks))
}

/// Puts filter blocks, which Jinja knows, into the place of generation blocks.
fn with_filter_blocks(source: &str) -> (String, bool) {
    let tag = |name: &str| Regex::new(&format!(r"\{{%([-+]?)\s*{name}\s*([-+]?)%\}}"));
    let (Ok(start), Ok(end)) = (tag("generation"), tag("endgeneration")) else {
        return (source.to_owned(), false);
    };
    let filter = format!("{{%$1 filter {GENERATION} $2%}}");
    let started = start.replace_all(source, filter);
    (end.replace_all(&started, "{%$1 endfilter $2%}").into_owned(), start.is_match(source))
}

fn invalid(message: impl Into<String>) -> Error {
    Error::new(ErrorKind::InvalidOperation, message.into())
}

fn raise(message: String) -> Result<Value, Error> {
    Err(invalid(message))
}

fn formatted(date: NaiveDate, format: &str) -> Result<String, Error> {
    let mut text = String::new();
    let midnight = date.and_time(chrono::NaiveTime::MIN);
    write!(text, "{}", midnight.format(format))
        .map_err(|_| invalid(format!("{format:?} is no format of a date")))?;
    Ok(text)
}

/// As Python's `json.dumps`, with the options that transformers lets through.
fn to_json(value: &Value, options: Kwargs) -> Result<String, Error> {
    let indent: Option<usize> = options.get("indent")?;
    let separators: Option<Vec<String>> = options.get("separators")?;
    let between = if indent.is_some() { "," } else { ", " };
    let [item, key] = match separators {
        Some(given) => given.try_into().map_err(|_| invalid("separators are two texts"))?,
        None => [between, ": "].map(str::to_owned),
    };
    let ascii = options.get::<Option<bool>>("ensure_ascii")?.unwrap_or(false);
    let sort_keys = options.get::<Option<bool>>("sort_keys")?.unwrap_or(false);
    options.assert_all_used()?;
    let mut json = Json { indent, item, key, ascii, sort_keys, text: String::new() };
    json.value(value, 1)?;
    Ok(json.text)
}

struct Json {
    indent: Option<usize>,
    /// Between items.
    item: String,
    /// Behind a key.
    key: String,
    ascii: bool,
    sort_keys: bool,
    text: String,
}

impl Json {
    fn value(&mut self, value: &Value, depth: usize) -> Result<(), Error> {
        match value.kind() {
            ValueKind::None | ValueKind::Undefined => self.text += "null",
            ValueKind::Bool => self.text += if value.is_true() { "true" } else { "false" },
            ValueKind::Number => self.text += &value.to_string(),
            ValueKind::String => self.string(value.as_str().unwrap_or_default())?,
            ValueKind::Seq | ValueKind::Iterable => {
                let items: Vec<Value> = value.try_iter()?.collect();
                self.items('[', items.into_iter().map(|item| (None, item)).collect(), ']', depth)?;
            }
            ValueKind::Map => {
                let mut keys: Vec<Value> = value.try_iter()?.collect();
                if self.sort_keys {
                    keys.sort();
                }
                let items =
                    keys.into_iter().map(|key| Ok((Some(key.to_string()), value.get_item(&key)?)));
                let items = items.collect::<Result<_, Error>>()?;
                self.items('{', items, '}', depth)?;
            }
            kind => return Err(invalid(format!("{kind} is no JSON"))),
        }
        Ok(())
    }

    fn items(
        &mut self,
        open: char,
        items: Vec<(Option<String>, Value)>,
        close: char,
        depth: usize,
    ) -> Result<(), Error> {
        self.text.push(open);
        let is_empty = items.is_empty();
        for (index, (key, item)) in items.into_iter().enumerate() {
            if index > 0 {
                self.text += &self.item.clone();
            }
            self.new_line(depth);
            if let Some(key) = key {
                self.string(&key)?;
                self.text += &self.key.clone();
            }
            self.value(&item, depth + 1)?;
        }
        if !is_empty {
            self.new_line(depth - 1);
        }
        self.text.push(close);
        Ok(())
    }

    fn new_line(&mut self, depth: usize) {
        if let Some(indent) = self.indent {
            self.text.push('\n');
            self.text.extend(std::iter::repeat_n(' ', indent * depth));
        }
    }

    fn string(&mut self, text: &str) -> Result<(), Error> {
        let quoted = serde_json::to_string(text)
            .map_err(|error| invalid("no JSON string").with_source(error))?;
        for c in quoted.chars() {
            if self.ascii && !c.is_ascii() {
                for unit in c.encode_utf16(&mut [0; 2]) {
                    let _ = write!(self.text, "\\u{unit:04x}");
                }
            } else {
                self.text.push(c);
            }
        }
        Ok(())
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    fn render(source: &str, date: Option<&str>) -> Result<String, Error> {
        let (environment, _) = environment("t", source, date)?;
        let value: Value = serde_json::from_str(
            r#"{"b": [1, 2.5, true, null], "a": {"text": "<é\n\"x\"\u0007>", "none": []}, "empty": {}}"#,
        )
        .unwrap();
        environment.get_template("t")?.render(Value::from_pairs([("value", value)]))
    }

    /// Printed by json.dumps of Python 3.13 with ensure_ascii=False and the same options.
    #[test]
    fn json_is_that_of_python() {
        let plain = r#"{"b": [1, 2.5, true, null], "a": {"text": "<é\n\"x\"\u0007>", "none": []}, "empty": {}}"#;
        assert_eq!(render("{{ value|tojson }}", None).unwrap(), plain);
        let sorted =
            r#"{"a":{"none":[],"text":"<\u00e9\n\"x\"\u0007>"},"b":[1,2.5,true,null],"empty":{}}"#;
        let options = "sort_keys=true, ensure_ascii=true, separators=(',', ':')";
        assert_eq!(render(&format!("{{{{ value|tojson({options}) }}}}"), None).unwrap(), sorted);
        let indented = "[\n  1,\n  2.5,\n  true,\n  null\n]";
        assert_eq!(render("{{ value.b|tojson(indent=2) }}", None).unwrap(), indented);
        assert!(render("{{ value|tojson(indents=2) }}", None).is_err());
    }

    #[test]
    fn a_day_is_told_only_where_one_is_given() {
        let source =
            "{% if strftime_now is defined %}{{ strftime_now('%d %b %Y') }}{% else %}-{% endif %}";
        assert_eq!(render(source, None).unwrap(), "-");
        assert_eq!(render(source, Some("2024-07-06")).unwrap(), "06 Jul 2024");
        assert!(render(source, Some("6 July")).unwrap_err().to_string().contains("2024-07-26"));
        assert!(render("{{ strftime_now('%Q') }}", Some("2024-07-06")).is_err());
    }

    #[test]
    fn blocks_and_exceptions_are_those_of_transformers() {
        let source = "a\n  {%- generation %}\n b \n  {% endgeneration -%}\n c";
        assert_eq!(render(source, None).unwrap(), format!("a{BLOCK_START} b \n{BLOCK_END}c"));
        let error = render("{{ raise_exception('not so') }}", None).unwrap_err();
        assert!(error.to_string().contains("not so"), "{error}");
    }

    #[test]
    fn loops_may_be_left_and_python_methods_called() {
        let source = "{% for c in 'a b c'.split(' ') %}{% if c == 'b' %}{% continue %}{% endif %}\
                      {{ c.upper() }}{% if loop.index == 3 %}{% break %}{% endif %}{% endfor %}";
        assert_eq!(render(source, None).unwrap(), "AC");
    }
}
