use std::fmt;

use serde::de::{Deserialize, Deserializer, IgnoredAny, MapAccess, SeqAccess, Visitor};

use super::Fault;

/// Names of fields that any source looks at; the others are skipped unread.
const FIELDS: [&str; 15] = [
    "id",
    "question",
    "conversations",
    "from",
    "value",
    "markdown",
    "text",
    "instruction",
    "input",
    "context",
    "category",
    "message_id",
    "parent_id",
    "prompt",
    "replies",
];

/// As much of a row as the sources look at, whatever its types are.
///
/// A row of the wrong shape is one bad row, not the end of the file, so reading must not fail where
/// a type differs. Of a list only the first element is kept.
#[derive(Clone, Debug, Default, PartialEq)]
pub enum Value {
    /// The field does not exist.
    #[default]
    Absent,
    /// `null`.
    Null,
    /// A number or boolean; its name in messages.
    Plain(&'static str),
    /// A text.
    Text(String),
    /// A list.
    List {
        /// Its first element.
        first: Box<Value>,
        /// The number of its elements.
        len: usize,
    },
    /// An object: its fields in their order.
    Object(Vec<(&'static str, Value)>),
}

impl Value {
    /// The name under which a source knows the field.
    pub(crate) fn field_name(name: &str) -> Option<&'static str> {
        FIELDS.into_iter().find(|&field| field == name)
    }

    /// Takes a field out of an object.
    pub fn take(&mut self, field: &str) -> Value {
        match self {
            Value::Object(fields) => {
                // A field that occurs twice has its last value.
                let place = fields.iter().rposition(|(name, _)| *name == field);
                place.map(|place| fields.remove(place).1).unwrap_or_default()
            }
            _ => Value::Absent,
        }
    }

    /// The text of a field that must have one.
    pub fn take_text(&mut self, field: &str) -> Result<String, Fault> {
        if !matches!(self, Value::Object(_)) {
            return Err(Fault(format!("is {}, not an object with `{field}`", self.kind())));
        }
        match self.take(field) {
            Value::Text(text) => Ok(text),
            Value::Absent => Err(Fault(format!("has no `{field}`"))),
            other => Err(Fault(format!("`{field}` is {}, not a text", other.kind()))),
        }
    }

    /// The text of a field that may be absent or null.
    pub fn take_optional_text(&mut self, field: &str) -> Result<Option<String>, Fault> {
        match self.take(field) {
            Value::Text(text) => Ok(Some(text)),
            Value::Absent | Value::Null => Ok(None),
            other => Err(Fault(format!("`{field}` is {}, not a text", other.kind()))),
        }
    }

    /// What it is, in messages.
    pub fn kind(&self) -> &'static str {
        match self {
            Value::Absent => "absent",
            Value::Null => "null",
            Value::Plain(kind) => kind,
            Value::Text(_) => "a text",
            Value::List { .. } => "a list",
            Value::Object(_) => "an object",
        }
    }
}

impl<'de> Deserialize<'de> for Value {
    fn deserialize<D: Deserializer<'de>>(deserializer: D) -> Result<Value, D::Error> {
        deserializer.deserialize_any(ValueVisitor)
    }
}

struct ValueVisitor;

impl<'de> Visitor<'de> for ValueVisitor {
    type Value = Value;

    fn expecting(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        f.write_str("any value")
    }

    fn visit_bool<E>(self, _: bool) -> Result<Value, E> {
        Ok(Value::Plain("a boolean"))
    }

    fn visit_i64<E>(self, _: i64) -> Result<Value, E> {
        Ok(Value::Plain("a number"))
    }

    fn visit_u64<E>(self, _: u64) -> Result<Value, E> {
        Ok(Value::Plain("a number"))
    }

    fn visit_f64<E>(self, _: f64) -> Result<Value, E> {
        Ok(Value::Plain("a number"))
    }

    fn visit_str<E>(self, text: &str) -> Result<Value, E> {
        Ok(Value::Text(text.to_owned()))
    }

    fn visit_string<E>(self, text: String) -> Result<Value, E> {
        Ok(Value::Text(text))
    }

    fn visit_unit<E>(self) -> Result<Value, E> {
        Ok(Value::Null)
    }

    fn visit_seq<A: SeqAccess<'de>>(self, mut elements: A) -> Result<Value, A::Error> {
        let Some(first) = elements.next_element()? else {
            return Ok(Value::List { first: Box::default(), len: 0 });
        };
        let mut len = 1;
        while elements.next_element::<IgnoredAny>()?.is_some() {
            len += 1;
        }
        Ok(Value::List { first: Box::new(first), len })
    }

    fn visit_map<A: MapAccess<'de>>(self, mut entries: A) -> Result<Value, A::Error> {
        let mut fields = Vec::new();
        while let Some(Key(name)) = entries.next_key()? {
            match name {
                Some(name) => {
                    fields.push((name, entries.next_value()?));
                }
                None => {
                    entries.next_value::<IgnoredAny>()?;
                }
            }
        }
        Ok(Value::Object(fields))
    }
}

/// The name of a field that a source looks at, found without an allocation.
struct Key(Option<&'static str>);

impl<'de> Deserialize<'de> for Key {
    fn deserialize<D: Deserializer<'de>>(deserializer: D) -> Result<Key, D::Error> {
        deserializer.deserialize_str(KeyVisitor)
    }
}

struct KeyVisitor;

impl Visitor<'_> for KeyVisitor {
    type Value = Key;

    fn expecting(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        f.write_str("a field name")
    }

    fn visit_str<E: serde::de::Error>(self, name: &str) -> Result<Key, E> {
        Ok(Key(Value::field_name(name)))
    }

    fn visit_bytes<E: serde::de::Error>(self, name: &[u8]) -> Result<Key, E> {
        std::str::from_utf8(name).map_err(E::custom).and_then(|name| self.visit_str(name))
    }
}
