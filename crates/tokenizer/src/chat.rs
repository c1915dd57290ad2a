//! Conversations as a model's own template writes them, as tokens, with the assistant's turns found.

use std::collections::BTreeMap;
use std::ops::Range;
use std::path::{Path, PathBuf};

use minijinja::value::ValueKind;
use minijinja::{Environment, Value};
use regex::Regex;
use serde::Deserialize;

use crate::format::TokenName;
use crate::jinja;
use crate::spans::{Found, longest_of};
use crate::{Error, Result, Tokenizer};

const CONFIG: &str = "tokenizer_config.json";
const JINJA: &str = "chat_template.jinja";
const NAME: &str = "chat";
const ASSISTANT: &str = "assistant";
/// Names for the reasoning before an answer. Templates read the first or, a few, the second.
const REASONING: [&str; 3] = ["reasoning_content", "thinking", "reasoning"];

/// Stands before the number of a name that a message spelled. No text can have it: Unicode gives these
/// code points to no character, and texts that have them nevertheless have them hidden, too.
const HIDDEN: char = '\u{fdd2}';
/// The number of a hidden name, counted from here (private use).
const NUMBERS: u32 = 0xf_0000;

/// Where a template is, and what it may know.
#[derive(Clone, Debug, Default, PartialEq, Eq)]
pub struct ChatOptions {
    /// A file instead of the tokenizer's own template: Jinja, or a `tokenizer_config.json` that holds one.
    pub template: Option<PathBuf>,
    /// The day that `strftime_now` tells, as `2024-07-26`. Without one the function is not defined:
    /// templates that can do without do, and what they write does not depend on the day.
    pub date: Option<String>,
}

/// Which of the assistant's turns are to be found.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum ChatTurns {
    /// All.
    All,
    /// The last.
    Last,
    /// None; any template can write such a conversation.
    None,
}

/// A message of a conversation: `role`, `content` and what else the template may want.
#[derive(Clone, Debug, PartialEq, Deserialize)]
#[serde(transparent)]
pub struct ChatMessage(Value);

/// Anything else that a template may want, such as the list of tools.
#[derive(Clone, Debug, PartialEq, Deserialize)]
#[serde(transparent)]
pub struct ChatValue(Value);

/// A conversation as tokens.
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct ChatTokens {
    /// What the template wrote.
    pub text: String,
    /// Its ids. BOS is among them where the template writes it.
    pub ids: Vec<u32>,
    /// Positions of the ids of each of the assistant's turns that were asked for, in order. Where the template
    /// has `{% generation %}` blocks, of what is in them; else of what follows the beginning of the turn.
    pub turns: Vec<Range<usize>>,
}

/// The Jinja template of a model's conversations, with the functions and filters that transformers'
/// `apply_chat_template` gives to it.
///
/// Names of special tokens stand for these tokens where the template writes them. In what a message says they
/// are plain text; transformers makes tokens of them unless `sanitize_control_tokens` is set.
pub struct ChatTemplate<'t> {
    tokenizer: &'t Tokenizer,
    path: PathBuf,
    environment: Environment<'static>,
    /// `bos_token` and its like.
    tokens: BTreeMap<&'static str, String>,
    /// What is hidden in messages, by number.
    hidden: Vec<String>,
    hidden_names: Option<Regex>,
    has_blocks: bool,
}

/// What a template wrote, with the marks taken out.
#[derive(Default)]
struct Written {
    text: String,
    controls: Vec<Found>,
    /// Bytes of `{% generation %}` blocks.
    blocks: Vec<Range<usize>>,
}

#[derive(Default, Deserialize)]
#[serde(default)]
struct ChatConfig {
    chat_template: Option<Templates>,
    bos_token: Option<TokenName>,
    eos_token: Option<TokenName>,
    unk_token: Option<TokenName>,
    pad_token: Option<TokenName>,
    sep_token: Option<TokenName>,
    cls_token: Option<TokenName>,
    mask_token: Option<TokenName>,
}

#[derive(Deserialize)]
#[serde(untagged)]
enum Templates {
    One(String),
    Named(Vec<NamedTemplate>),
}

#[derive(Deserialize)]
struct NamedTemplate {
    name: String,
    template: String,
}

impl ChatMessage {
    /// A message of a role (`system`, `user`, `assistant`) and its text.
    pub fn new(role: &str, content: &str) -> Self {
        Self(Value::from_pairs([("role", role), ("content", content)]))
    }

    /// Its role, if it has one.
    pub fn role(&self) -> Option<String> {
        self.text_of("role")
    }

    /// What it says, if that is one text.
    pub fn content(&self) -> Option<String> {
        self.text_of("content")
    }

    fn text_of(&self, field: &str) -> Option<String> {
        self.0.get_attr(field).ok()?.as_str().map(str::to_owned)
    }
}

impl<'t> ChatTemplate<'t> {
    /// Reads the template that stands beside a tokenizer: `chat_template.jinja`, else `chat_template` of
    /// `tokenizer_config.json`. `path` is the tokenizer's file or folder; the names of its tokens come from
    /// there also where `options` name another template.
    ///
    /// # Errors
    /// [`Error::NoChatTemplate`], a file that cannot be read, a template with a mistake, a date that is none.
    pub fn open(
        tokenizer: &'t Tokenizer,
        path: impl AsRef<Path>,
        options: &ChatOptions,
    ) -> Result<Self> {
        let file = Tokenizer::file(path);
        let own = read_config(&file.with_file_name(CONFIG))?;
        let config = own.unwrap_or_default();
        let tokens = config.tokens(tokenizer);
        let (path, source) = match &options.template {
            Some(given) => source_of(given)?,
            None => beside(&file, config.chat_template)?,
        };
        let refused = |message: String| Error::ChatTemplate { path: path.clone(), message };
        let (environment, has_blocks) = jinja::environment(NAME, &source, options.date.as_deref())
            .map_err(|error| refused(error.to_string()))?;
        let marks = [jinja::BLOCK_START, jinja::BLOCK_END, HIDDEN].map(String::from);
        let hidden: Vec<String> = tokenizer.controls.names().cloned().chain(marks).collect();
        let hidden_names = longest_of(&hidden);
        Ok(Self { tokenizer, path, environment, tokens, hidden, hidden_names, has_blocks })
    }

    /// The file that the template was read from.
    pub fn path(&self) -> &Path {
        &self.path
    }

    /// Writes a conversation and makes it tokens. `tools` is for templates that know of them.
    ///
    /// # Errors
    /// [`Error::ChatTemplate`] where the template refuses the conversation, [`Error::TurnRewritten`] where it has
    /// no `{% generation %}` blocks and the place of a turn cannot be told.
    pub fn encode(
        &self,
        messages: &[ChatMessage],
        tools: Option<&ChatValue>,
        turns: ChatTurns,
    ) -> Result<ChatTokens> {
        let hidden: Vec<Value> = messages.iter().map(|message| self.message(message)).collect();
        let tools = tools.map_or(Value::from(()), |tools| self.hide(&tools.0));
        let written = self.write(&hidden, &tools, false)?;
        let spans = match turns {
            ChatTurns::None => vec![],
            _ if self.has_blocks => {
                let first = if turns == ChatTurns::Last {
                    written.blocks.len().saturating_sub(1)
                } else {
                    0
                };
                written.blocks[first..].to_vec()
            }
            _ => {
                let of_assistant =
                    |index: &usize| messages[*index].role().as_deref() == Some(ASSISTANT);
                let mut places: Vec<usize> = (0..messages.len()).filter(of_assistant).collect();
                if turns == ChatTurns::Last {
                    places.drain(..places.len().saturating_sub(1));
                }
                let place = |index| self.turn(index, &hidden, &tools, &written.text);
                places.into_iter().map(place).collect::<Result<_>>()?
            }
        };
        let tokens = self.tokenizer.tokens_of(&written.text, &written.controls);
        let turns = spans.iter().map(|span| tokens.of(span)).collect();
        Ok(ChatTokens { text: written.text, ids: tokens.ids, turns })
    }

    /// The bytes of a turn in the whole text: from where the template would ask for it to where the next
    /// message begins.
    fn turn(
        &self,
        index: usize,
        messages: &[Value],
        tools: &Value,
        whole: &str,
    ) -> Result<Range<usize>> {
        let rewritten = || Error::TurnRewritten { path: self.path.clone(), turn: index + 1 };
        let place = |messages: &[Value], prompt| {
            let part = self.write(messages, tools, prompt)?.text;
            if whole.starts_with(&part) { Ok(part.len()) } else { Err(rewritten()) }
        };
        let start = place(&messages[..index], true)?;
        let end = match index + 1 == messages.len() {
            true => whole.len(),
            false => place(&messages[..=index], false)?,
        };
        if start <= end { Ok(start..end) } else { Err(rewritten()) }
    }

    fn write(&self, messages: &[Value], tools: &Value, prompt: bool) -> Result<Written> {
        let tokens = self.tokens.iter().map(|(name, token)| (*name, Value::from(token)));
        let given = [
            ("messages", Value::from(messages)),
            ("tools", tools.clone()),
            ("documents", Value::from(())),
            ("add_generation_prompt", Value::from(prompt)),
        ];
        let context = Value::from_pairs(tokens.chain(given));
        let template = self.environment.get_template(NAME);
        let marked = template.and_then(|template| template.render(context));
        let refused = |error: minijinja::Error| Error::ChatTemplate {
            path: self.path.clone(),
            message: error.to_string(),
        };
        Ok(self.without_marks(&marked.map_err(refused)?))
    }

    /// A message as the template sees it, as in transformers: without fields that are null, with its reasoning under
    /// the names that templates have for it.
    fn message(&self, message: &ChatMessage) -> Value {
        let Some(mut given) = pairs(&message.0) else { return self.hide(&message.0) };
        given.retain(|(_, value)| !value.is_none());
        let named = |name: &&str| given.iter().find(|(key, _)| key.as_str() == Some(*name));
        if let Some((_, reasoning)) = REASONING.iter().find_map(named).cloned() {
            let [standard, older, _] = REASONING.map(Value::from);
            // Of two values for one name the later one counts.
            given.insert(0, (older, reasoning.clone()));
            given.push((standard, reasoning));
        }
        Value::from_pairs(given.into_iter().map(|(key, value)| (key, self.hide(&value))))
    }

    /// The value with all texts in it hidden.
    fn hide(&self, value: &Value) -> Value {
        if let Some(text) = value.as_str() {
            return Value::from(self.hide_names(text));
        }
        match (value.kind(), pairs(value)) {
            (_, Some(pairs)) => {
                Value::from_pairs(pairs.into_iter().map(|(key, value)| (key, self.hide(&value))))
            }
            (ValueKind::Seq, None) => match value.try_iter() {
                Ok(items) => Value::from(items.map(|item| self.hide(&item)).collect::<Vec<_>>()),
                Err(_) => value.clone(),
            },
            _ => value.clone(),
        }
    }

    fn hide_names(&self, text: &str) -> String {
        let Some(names) = &self.hidden_names else { return text.to_owned() };
        let numbered = |found: &regex::Captures<'_>| {
            let number = self.hidden.iter().position(|name| *name == found[0]).unwrap_or(0) as u32;
            [HIDDEN, char::from_u32(NUMBERS + number).unwrap_or(char::REPLACEMENT_CHARACTER)]
                .iter()
                .collect::<String>()
        };
        names.replace_all(text, numbered).into_owned()
    }

    /// What a template wrote: names that are its own are found, names that messages spelled come back.
    fn without_marks(&self, marked: &str) -> Written {
        let mut written = Written::default();
        let mut block = 0;
        let mut rest = marked;
        while let Some(at) = rest.find([jinja::BLOCK_START, jinja::BLOCK_END, HIDDEN]) {
            let (own, behind) = rest.split_at(at);
            written.push(own, self.tokenizer);
            let mut behind = behind.chars();
            match behind.next() {
                Some(jinja::BLOCK_START) => block = written.text.len(),
                Some(jinja::BLOCK_END) => written.blocks.push(block..written.text.len()),
                _ => {
                    let number = behind.next().map_or(0, |c| (c as u32).wrapping_sub(NUMBERS));
                    if let Some(name) = self.hidden.get(number as usize) {
                        written.text += name;
                    }
                }
            }
            rest = behind.as_str();
        }
        written.push(rest, self.tokenizer);
        written
    }
}

impl std::fmt::Debug for ChatTemplate<'_> {
    fn fmt(&self, f: &mut std::fmt::Formatter<'_>) -> std::fmt::Result {
        f.debug_struct("ChatTemplate")
            .field("path", &self.path)
            .field("has_blocks", &self.has_blocks)
            .finish_non_exhaustive()
    }
}

impl Written {
    /// Adds text in which names stand for tokens.
    fn push(&mut self, text: &str, tokenizer: &Tokenizer) {
        let at = self.text.len();
        self.controls.extend(
            tokenizer.controls.find(text).into_iter().map(|found| Found {
                bytes: at + found.bytes.start..at + found.bytes.end,
                ..found
            }),
        );
        self.text += text;
    }
}

impl ChatConfig {
    /// Texts of the tokens that a template may name.
    fn tokens(&self, tokenizer: &Tokenizer) -> BTreeMap<&'static str, String> {
        let own = |id: Option<u32>| id.and_then(|id| tokenizer.token(id)).map(str::to_owned);
        let named = |name: &Option<TokenName>| name.as_ref().map(|name| name.content().to_owned());
        [
            ("bos_token", named(&self.bos_token).or_else(|| own(tokenizer.bos_id()))),
            ("eos_token", named(&self.eos_token).or_else(|| own(tokenizer.eos_id()))),
            ("unk_token", named(&self.unk_token)),
            ("pad_token", named(&self.pad_token)),
            ("sep_token", named(&self.sep_token)),
            ("cls_token", named(&self.cls_token)),
            ("mask_token", named(&self.mask_token)),
        ]
        .into_iter()
        .filter_map(|(name, token)| Some((name, token?)))
        .collect()
    }
}

/// Keys and values, if it is a map.
fn pairs(value: &Value) -> Option<Vec<(Value, Value)>> {
    if value.kind() != ValueKind::Map {
        return None;
    }
    let keys = value.try_iter().ok()?;
    keys.map(|key| Some((key.clone(), value.get_item(&key).ok()?))).collect()
}

/// The template that stands beside a tokenizer's file.
fn beside(tokenizer: &Path, configured: Option<Templates>) -> Result<(PathBuf, String)> {
    let jinja = tokenizer.with_file_name(JINJA);
    if jinja.exists() {
        return source_of(&jinja);
    }
    let path = tokenizer.with_file_name(CONFIG);
    default_of(configured)
        .map(|source| (path.clone(), source))
        .ok_or(Error::NoChatTemplate { path })
}

/// The template in a file.
fn source_of(path: &Path) -> Result<(PathBuf, String)> {
    if path.extension().is_some_and(|extension| extension == "json") {
        let config = read_config(path)?.ok_or_else(|| Error::Open {
            path: path.to_owned(),
            source: std::io::ErrorKind::NotFound.into(),
        })?;
        let none = || Error::NoChatTemplate { path: path.to_owned() };
        return Ok((path.to_owned(), default_of(config.chat_template).ok_or_else(none)?));
    }
    let source = std::fs::read_to_string(path);
    let source = source.map_err(|source| Error::Open { path: path.to_owned(), source })?;
    Ok((path.to_owned(), source))
}

fn default_of(templates: Option<Templates>) -> Option<String> {
    match templates? {
        Templates::One(source) => Some(source),
        Templates::Named(named) => {
            named.into_iter().find(|one| one.name == "default").map(|one| one.template)
        }
    }
}

/// `None` where there is no such file.
fn read_config(path: &Path) -> Result<Option<ChatConfig>> {
    match std::fs::read(path) {
        Ok(bytes) => serde_json::from_slice(&bytes)
            .map_err(|source| Error::Parse { path: path.to_owned(), source })
            .map(Some),
        Err(error) if error.kind() == std::io::ErrorKind::NotFound => Ok(None),
        Err(source) => Err(Error::Open { path: path.to_owned(), source }),
    }
}
