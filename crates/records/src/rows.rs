use serde::{Deserialize, Serialize};

/// The source of a prompt that does not name one.
pub const UNKNOWN_SOURCE: &str = "unknown";

/// A prompt to be answered: what step 1 writes and step 2 reads.
///
/// Other fields of a row (Dromedary's files have an empty `output`) are passed over.
#[derive(Clone, Debug, PartialEq, Eq, Serialize, Deserialize)]
pub struct Prompt {
    /// See [`row_id`](crate::row_id).
    pub id: String,
    /// The collection it comes from, such as `sharegpt`.
    pub source: String,
    /// The question or task.
    pub instruction: String,
    /// What the instruction is about; empty for most.
    #[serde(default)]
    pub input: String,
}

/// A generated response: what step 2's generation appends, one line a row.
///
/// It holds what depends on the row alone, so that runs on any number of processes give the same
/// lines.
#[derive(Clone, Debug, PartialEq, Eq, Serialize, Deserialize)]
pub struct AlignedResponse {
    /// The prompt's id.
    pub id: String,
    /// The prompt's source.
    pub source: String,
    /// The prompt's instruction.
    pub instruction: String,
    /// The prompt's input.
    #[serde(default)]
    pub input: String,
    /// The generated text, internal thoughts included.
    pub output: String,
    /// Why it ends.
    pub finish_reason: FinishReason,
    /// Tokens of the whole prompt, the shared prefix included.
    pub prompt_tokens: u32,
    /// Tokens generated.
    pub output_tokens: u32,
    /// The seed of the run.
    pub seed: u64,
}

/// Why a response ends.
#[derive(Clone, Copy, Debug, PartialEq, Eq, PartialOrd, Ord, Serialize, Deserialize)]
#[serde(rename_all = "snake_case")]
pub enum FinishReason {
    /// The model ended its text.
    Eos,
    /// A stop string appeared.
    Stop,
    /// The limit of generated tokens was reached: the text is cut.
    Length,
    /// The prompt was too long and there is no text.
    Rejected,
}

/// An example to train on: what step 2's filter writes and step 3 reads.
#[derive(Clone, Debug, PartialEq, Eq, Serialize, Deserialize)]
pub struct TrainingRow {
    /// The number of the row, from 1; it chooses the meta prompt.
    pub example_id: u64,
    /// The question or task.
    pub instruction: String,
    /// What the instruction is about; empty for most.
    #[serde(default)]
    pub input: String,
    /// The answer to learn.
    pub output: String,
    /// The short system prompt that this row alone reads, in place of the one its number chooses.
    #[serde(default, skip_serializing_if = "Option::is_none")]
    pub meta_prompt: Option<String>,
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn fields_of_the_original_are_accepted() {
        let text =
            r#"{"id": "a", "source": "dolly", "instruction": "i", "input": "", "output": ""}"#;
        let prompt: Prompt = serde_json::from_str(text).unwrap();
        assert_eq!((prompt.id.as_str(), prompt.source.as_str()), ("a", "dolly"));
        let text = r#"{"instruction": "i", "input": "", "output": "o", "example_id": 3}"#;
        let row: TrainingRow = serde_json::from_str(text).unwrap();
        assert_eq!((row.example_id, &row.meta_prompt), (3, &None));
        assert!(!serde_json::to_string(&row).unwrap().contains("meta_prompt"));
        let text =
            r##"{"instruction": "i", "output": "o", "example_id": 3, "meta_prompt": "# M"}"##;
        let row: TrainingRow = serde_json::from_str(text).unwrap();
        assert_eq!(row.meta_prompt.as_deref(), Some("# M"));
    }

    #[test]
    fn a_response_is_written_as_others_read_it() {
        let response = AlignedResponse {
            id: "a".to_owned(),
            source: "dolly".to_owned(),
            instruction: "i".to_owned(),
            input: String::new(),
            output: "o".to_owned(),
            finish_reason: FinishReason::Eos,
            prompt_tokens: 1,
            output_tokens: 2,
            seed: u64::MAX,
        };
        let text = serde_json::to_string(&response).unwrap();
        assert_eq!(
            text,
            "{\"id\":\"a\",\"source\":\"dolly\",\"instruction\":\"i\",\"input\":\"\",\"output\":\"o\",\
             \"finish_reason\":\"eos\",\"prompt_tokens\":1,\"output_tokens\":2,\
             \"seed\":18446744073709551615}"
        );
        assert_eq!(serde_json::from_str::<AlignedResponse>(&text).unwrap(), response);
    }

    #[test]
    fn an_output_that_is_an_object_is_an_error() {
        // Dromedary's generation writes one, and its merge fails on it much later.
        let text = r#"{"example_id": 1, "instruction": "i", "output": {"generation": "o"}}"#;
        let error = serde_json::from_str::<TrainingRow>(text).unwrap_err().to_string();
        assert!(error.contains("expected a string"), "{error}");
    }
}
