//! The formats of a data set by name: which fields a row has, and what of it is read and learned.

use std::{collections::BTreeMap, fmt, path::Path};

use dromedary_records::{RawRow, TrainingRow};
use dromedary_tokenizer::{ChatMessage, ChatValue};
use serde::{Deserialize, Serialize, de::DeserializeOwned};
use serde_json::Value;

use crate::{
    dataset::{MetaPrompts, SourceTarget},
    error::{Error, Result},
    transcript::{self, Transcript},
};

/// Form of the rows of a data set.
#[derive(
    Clone, Copy, Debug, Default, PartialEq, Eq, Hash, Serialize, Deserialize, clap::ValueEnum,
)]
#[serde(rename_all = "kebab-case")]
pub enum DatasetFormat {
    /// Rows of step 2, in the form of `prompts/dromedary_*_prompt_distill.txt`.
    #[default]
    Dromedary,
    /// `instruction`, `input`, `output` in the form of Stanford's Alpaca.
    #[value(alias = "alpaca-clean")]
    #[serde(alias = "alpaca-clean")]
    Alpaca,
    /// `text` with `<human>: ` and `<bot>: `, a question and an answer.
    Chip2,
    /// `prompt` and `completion`, as they are.
    SelfInstruct,
    /// `input` and `output`, as they are.
    InputOutput,
    /// `chosen`, a transcript with `Human:` and `Assistant:`.
    HhRlhf,
    /// `text`, a transcript with `### Human:` and `### Assistant:` (guanaco).
    #[value(alias = "guanaco")]
    #[serde(alias = "guanaco")]
    Oasst1,
    /// `conversations` of `from` and `value`, in the form of the chat template.
    Sharegpt,
    /// `messages` of `role` and `content`, in the form of the chat template.
    Chat,
}

/// A row before it is tokens.
#[derive(Clone, Debug, PartialEq)]
pub(crate) enum RowText {
    /// A source that is read, and a target that is learned.
    Pair(SourceTarget),
    /// A conversation with marks between its turns.
    Transcript(Transcript),
    /// A conversation that a chat template writes.
    Chat { messages: Vec<ChatMessage>, tools: Option<ChatValue> },
}

/// A row that has been parsed: its text, its id, and the name of its meta prompt where it has one.
#[derive(Clone, Debug, PartialEq)]
pub(crate) struct Row {
    pub(crate) example_id: u64,
    pub(crate) text: RowText,
    pub(crate) meta_prompt: Option<String>,
}

#[derive(Deserialize)]
struct AlpacaRow {
    instruction: String,
    #[serde(default)]
    input: Option<String>,
    output: String,
}

#[derive(Deserialize)]
struct TextRow {
    text: String,
}

#[derive(Deserialize)]
struct SelfInstructRow {
    prompt: String,
    completion: String,
}

#[derive(Deserialize)]
struct InputOutputRow {
    input: String,
    output: String,
}

#[derive(Deserialize)]
struct HhRlhfRow {
    chosen: String,
}

#[derive(Deserialize)]
struct SharegptRow {
    conversations: Vec<SharegptTurn>,
    #[serde(default)]
    system: Option<String>,
}

#[derive(Deserialize)]
struct SharegptTurn {
    from: String,
    value: String,
}

#[derive(Deserialize)]
struct ChatRow {
    messages: Vec<ChatMessage>,
    #[serde(default)]
    tools: Option<ChatValue>,
}

/// Who speaks in ShareGPT's conversations, and what a chat template calls them.
const SPEAKERS: [(&str, &str); 8] = [
    ("human", "user"),
    ("user", "user"),
    ("gpt", "assistant"),
    ("chatgpt", "assistant"),
    ("assistant", "assistant"),
    ("bing", "assistant"),
    ("bard", "assistant"),
    ("system", "system"),
];

/// A row's fields, whatever they are.
type Fields = BTreeMap<String, Value>;

impl DatasetFormat {
    /// All formats, in the order in which a row's fields are compared with them: those with the most telling
    /// names first.
    const ALL: [Self; 9] = [
        Self::Chat,
        Self::Sharegpt,
        Self::HhRlhf,
        Self::SelfInstruct,
        Self::Dromedary,
        Self::Alpaca,
        Self::InputOutput,
        Self::Chip2,
        Self::Oasst1,
    ];

    /// Fields that a row must have.
    pub fn fields(self) -> &'static [&'static str] {
        match self {
            Self::Dromedary => &["example_id", "instruction", "output"],
            Self::Alpaca => &["instruction", "output"],
            Self::Chip2 | Self::Oasst1 => &["text"],
            Self::SelfInstruct => &["prompt", "completion"],
            Self::InputOutput => &["input", "output"],
            Self::HhRlhf => &["chosen"],
            Self::Sharegpt => &["conversations"],
            Self::Chat => &["messages"],
        }
    }

    /// Whether rows have several turns, of which some are learned.
    pub fn is_conversation(self) -> bool {
        matches!(self, Self::HhRlhf | Self::Oasst1) || self.has_chat_template()
    }

    /// Whether a chat template writes the rows.
    pub fn has_chat_template(self) -> bool {
        matches!(self, Self::Sharegpt | Self::Chat)
    }

    /// What ends an answer in rows of this format, besides EOS.
    pub fn stop_mark(self) -> Option<&'static str> {
        match self {
            Self::Dromedary => Some("### User"),
            Self::Oasst1 => Some(transcript::OASST1.human),
            Self::HhRlhf => Some(transcript::HH_RLHF.human.trim_start()),
            _ => None,
        }
    }

    /// The form of a prompt whose answer a model that was trained on this format gives.
    pub(crate) fn prompt_form(self) -> String {
        match self {
            Self::Dromedary => "{system prompt}\n{question}\n\n### Dromedary".to_owned(),
            Self::Alpaca => alpaca_source("{instruction}", ""),
            Self::Chip2 | Self::SelfInstruct | Self::InputOutput => "{question}".to_owned(),
            Self::Oasst1 => "### Human: {question}### Assistant:".to_owned(),
            Self::HhRlhf => "\n\nHuman: {question}\n\nAssistant:".to_owned(),
            Self::Sharegpt | Self::Chat => {
                "what the chat template writes of {messages}, with its generation prompt".to_owned()
            }
        }
    }

    /// The format that the fields of a file's first row have.
    ///
    /// # Errors
    /// [`Error::UnknownFormat`] where they have none's.
    pub(crate) fn of_first_row(path: &Path, row: &RawRow) -> Result<Self> {
        let fields: Fields =
            row.parse().map_err(|source| Error::Dataset { path: path.to_owned(), source })?;
        let text = fields.get("text").and_then(Value::as_str).unwrap_or_default();
        let fits = |format: &Self| match format {
            Self::Chip2 => text.contains(CHIP2_HUMAN),
            Self::Oasst1 => text.contains(transcript::OASST1.human),
            _ => format.has_fields(&fields),
        };
        Self::ALL
            .into_iter()
            .find(fits)
            .ok_or_else(|| Error::UnknownFormat { path: path.to_owned(), fields: names(&fields) })
    }

    fn has_fields(self, fields: &Fields) -> bool {
        self.fields().iter().all(|name| fields.contains_key(*name))
    }

    /// A row of a file as text; `number` is its number in the file, from 1.
    ///
    /// # Errors
    /// [`Error::BadRow`], [`Error::NoMetaPromptForRow`], and [`Error::Dataset`] for what is no JSON object.
    pub(crate) fn row(
        self,
        path: &Path,
        raw: &RawRow,
        number: usize,
        meta_prompts: &MetaPrompts,
    ) -> Result<Row> {
        let at = At { format: self, path, raw, number };
        let example_id = number as u64;
        let pair = |source: String, target: String| {
            RowText::Pair(SourceTarget { example_id, source, target })
        };
        let text = match self {
            Self::Dromedary => return dromedary_row(&at, meta_prompts),
            Self::Alpaca => {
                let AlpacaRow { instruction, input, output } = at.parse()?;
                pair(alpaca_source(&instruction, &input.unwrap_or_default()), output)
            }
            Self::Chip2 => {
                let TextRow { text } = at.parse()?;
                let (source, target) = chip2_pair(&text).map_err(|problem| at.bad(problem))?;
                pair(source, target)
            }
            Self::SelfInstruct => {
                let SelfInstructRow { prompt, completion } = at.parse()?;
                pair(prompt, completion)
            }
            Self::InputOutput => {
                let InputOutputRow { input, output } = at.parse()?;
                pair(input, output)
            }
            Self::HhRlhf => {
                let HhRlhfRow { chosen } = at.parse()?;
                at.transcript(chosen, &transcript::HH_RLHF)?
            }
            Self::Oasst1 => {
                let TextRow { text } = at.parse()?;
                at.transcript(text, &transcript::OASST1)?
            }
            Self::Sharegpt => {
                let row: SharegptRow = at.parse()?;
                RowText::Chat {
                    messages: sharegpt_messages(row).map_err(|p| at.bad(p))?,
                    tools: None,
                }
            }
            Self::Chat => {
                let ChatRow { messages, tools } = at.parse()?;
                if let Some(index) = messages.iter().position(|message| message.role().is_none()) {
                    return Err(at.bad(format!("message {} has no role", index + 1)));
                }
                RowText::Chat { messages, tools }
            }
        };
        Ok(Row { example_id, text, meta_prompt: None })
    }
}

impl fmt::Display for DatasetFormat {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        let value = clap::ValueEnum::to_possible_value(self);
        f.write_str(value.as_ref().map_or("", |value| value.get_name()))
    }
}

/// A row, and where it stands.
struct At<'a> {
    format: DatasetFormat,
    path: &'a Path,
    raw: &'a RawRow,
    number: usize,
}

impl At<'_> {
    fn parse<T: DeserializeOwned>(&self) -> Result<T> {
        self.raw.parse().map_err(|source| match self.raw.parse::<Fields>() {
            Ok(fields) => self.misfit(&source.bad_row(), &fields),
            Err(_) => Error::Dataset { path: self.path.to_owned(), source },
        })
    }

    /// The error of a row that has not the fields of its format, or not of the right kind.
    fn misfit(&self, message: &str, fields: &Fields) -> Error {
        let lacks = |name: &&&str| !fields.contains_key(**name);
        let missing: Vec<_> =
            self.format.fields().iter().filter(lacks).map(|name| format!("`{name}`")).collect();
        let others: Vec<_> = DatasetFormat::ALL
            .into_iter()
            .filter(|other| *other != self.format && other.has_fields(fields))
            .map(|other| other.to_string())
            .collect();
        let mut problem = match missing.as_slice() {
            // Behind the row's number, which the error itself names.
            [] => message.split_once(": ").map_or(message, |(_, message)| message).to_owned(),
            missing => format!("it has no {}", missing.join(" and no ")),
        };
        problem += &format!("; its fields are {}", names(fields));
        if let (false, false) = (missing.is_empty(), others.is_empty()) {
            problem += &format!(", as in --dataset-format {}", others.join(" or "));
        }
        self.bad(problem)
    }

    fn bad(&self, problem: String) -> Error {
        let Self { format, path, number, .. } = *self;
        Error::BadRow { path: path.to_owned(), row: number, format, problem }
    }

    fn transcript(&self, text: String, marks: &'static transcript::Marks) -> Result<RowText> {
        let none = || self.bad(format!("its text has no {:?}, nor the other mark", marks.human));
        Ok(RowText::Transcript(Transcript::parse(text, marks).ok_or_else(none)?))
    }
}

fn names(fields: &Fields) -> String {
    match fields.is_empty() {
        true => "none".to_owned(),
        false => fields.keys().map(|name| format!("`{name}`")).collect::<Vec<_>>().join(", "),
    }
}

fn dromedary_row(at: &At<'_>, meta_prompts: &MetaPrompts) -> Result<Row> {
    let row: TrainingRow = at.parse()?;
    let example_id = row.example_id;
    let pair = meta_prompts.source_target(&row).ok_or_else(|| Error::NoMetaPromptForRow {
        path: at.path.to_owned(),
        row: at.number,
        example_id,
    })?;
    let meta_prompt = Some(meta_prompts.name_for(&row));
    Ok(Row { example_id, text: RowText::Pair(pair), meta_prompt })
}

/// Stanford's form, with the space at the end that Dromedary's script (`data_utils_sft.py`) has it with.
fn alpaca_source(instruction: &str, input: &str) -> String {
    const TASK: &str = "Below is an instruction that describes a task";
    const REQUEST: &str = "Write a response that appropriately completes the request.";
    const RESPONSE: &str = "### Response: ";
    match input {
        "" => format!("{TASK}. {REQUEST}\n\n### Instruction:\n{instruction}\n\n{RESPONSE}"),
        input => format!(
            "{TASK}, paired with an input that provides further context. {REQUEST}\n\n\
             ### Instruction:\n{instruction}\n\n### Input:\n{input}\n\n{RESPONSE}"
        ),
    }
}

const CHIP2_HUMAN: &str = "<human>: ";
const CHIP2_BOT: &str = "\n<bot>: ";

/// Question and answer. Dromedary's script takes the first answer of several and drops the rest unsaid.
fn chip2_pair(text: &str) -> std::result::Result<(String, String), String> {
    match text.split(CHIP2_BOT).collect::<Vec<_>>()[..] {
        [source, target] => Ok((source.replace(CHIP2_HUMAN, ""), target.to_owned())),
        ref parts => Err(format!(
            "its text has {} times {CHIP2_BOT:?} instead of once",
            parts.len().saturating_sub(1)
        )),
    }
}

/// What the chat template is to write. What the model says before anybody has asked is left out, as others who
/// train on these conversations do.
fn sharegpt_messages(row: SharegptRow) -> std::result::Result<Vec<ChatMessage>, String> {
    let mut messages: Vec<(&str, String)> = Vec::new();
    messages.extend(row.system.filter(|system| !system.is_empty()).map(|text| ("system", text)));
    for (index, SharegptTurn { from, value }) in row.conversations.into_iter().enumerate() {
        let role = SPEAKERS.iter().find(|(name, _)| *name == from).map(|(_, role)| *role);
        let role = role.ok_or_else(|| {
            let known: Vec<_> = SPEAKERS.iter().map(|(name, _)| *name).collect();
            format!("turn {} is from {from:?}; known are {}", index + 1, known.join(", "))
        })?;
        let is_asked = messages.iter().any(|(role, _)| *role == "user");
        if role != "assistant" || is_asked {
            messages.push((role, value));
        }
    }
    Ok(messages.iter().map(|(role, text)| ChatMessage::new(role, text)).collect())
}
