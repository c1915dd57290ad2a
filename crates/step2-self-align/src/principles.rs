use std::fmt::Write as _;
use std::fs;
use std::path::{Path, PathBuf};

use serde::{Deserialize, Serialize};

use crate::{Error, Result};

/// The principles that come with the program.
const BUILT_IN: &str = include_str!("../../../prompts/self_align_principles.toml");
const BUILT_IN_NAME: &str = "prompts/self_align_principles.toml (built in)";

/// The prompt of verbose cloning that comes with the program.
const VERBOSE: &str = include_str!("../../../prompts/dromedary_verbose_prompt.txt");
const VERBOSE_NAME: &str = "prompts/dromedary_verbose_prompt.txt (built in)";
const VERBOSE_USER: &str = "### User";

/// Rules, exemplars, cues, names, stop strings and black list: the source of the meta prompt and
/// of what the filter looks for.
///
/// It is read from a TOML file; unknown keys are errors. A `.txt` given as meta prompt replaces
/// the rendered text only, and the rest stays as built in: see [`MetaPrompt`].
#[derive(Clone, Debug, PartialEq, Eq, Deserialize)]
#[serde(deny_unknown_fields)]
#[non_exhaustive]
pub struct Principles {
    /// First heading of the prompt.
    pub title: String,
    /// Sentence before the rules.
    pub opening: String,
    /// Sentence before the exemplars.
    pub examples_opening: String,
    /// Sentence with which the thoughts of each row in form open.
    pub affirmation: String,
    /// Texts that end the generation of a row.
    pub stop_strings: Vec<String>,
    /// Words and figures of the exemplars that no answer should hold.
    pub black_list: Vec<String>,
    /// The marks of the turns.
    pub cues: Cues,
    /// Who speaks.
    pub names: Names,
    /// The rules, numbered from 1 in the prompt.
    pub rules: Vec<PrincipleRule>,
    /// The conversations that show the form.
    pub exemplars: Vec<Exemplar>,
}

/// The marks of the turns in prompt and completion.
#[derive(Clone, Debug, PartialEq, Eq, Deserialize)]
#[serde(deny_unknown_fields)]
#[non_exhaustive]
pub struct Cues {
    /// Before what the user says; the prompt ends in it.
    pub user: String,
    /// Before the thoughts.
    pub thoughts: String,
    /// Before the answer.
    pub answer: String,
    /// The user's turn that ends one exemplar.
    pub clear_context: String,
    /// Before the reply to it.
    pub auto_reply: String,
    /// The reply to it.
    pub auto_reply_text: String,
}

/// Who speaks, in the prompt and in the rows that are trained on.
#[derive(Clone, Debug, PartialEq, Eq, Deserialize)]
#[serde(deny_unknown_fields)]
#[non_exhaustive]
pub struct Names {
    /// The assistant of the prompt.
    pub assistant: String,
    /// Its name in the training rows.
    pub product: String,
    /// Who made it, in the identity rows.
    pub maker: String,
}

/// One rule of the prompt: `N (name). text`.
#[derive(Clone, Debug, PartialEq, Eq, Deserialize)]
#[serde(deny_unknown_fields)]
#[non_exhaustive]
pub struct PrincipleRule {
    /// The word by which thoughts cite it.
    pub name: String,
    /// What the assistant should do.
    pub text: String,
}

/// One conversation of the prompt: question, thoughts, answer.
#[derive(Clone, Debug, PartialEq, Eq, Deserialize)]
#[serde(deny_unknown_fields)]
#[non_exhaustive]
pub struct Exemplar {
    /// What it shows; for the reader of the file, it is not rendered.
    pub subject: String,
    /// It goes on with the conversation of the one before, without clearing the context.
    #[serde(default)]
    pub continues: bool,
    /// The instruction.
    pub user: String,
    /// What the instruction is about; rendered below a blank line.
    #[serde(default)]
    pub input: Option<String>,
    /// The thoughts behind the affirmation.
    pub thoughts: String,
    /// The answer.
    pub answer: String,
}

impl Principles {
    /// The principles that come with the program: 17 rules, 7 exemplars.
    ///
    /// # Errors
    /// Where the built-in text breaks its form; a test shows that it does not.
    pub fn built_in() -> Result<Self> {
        Self::parse(BUILT_IN, Path::new(BUILT_IN_NAME))
    }

    /// Reads principles from a TOML file.
    ///
    /// # Errors
    /// [`Error::Read`], or [`Error::Principles`] naming the file and what is wrong.
    pub fn open(path: &Path) -> Result<Self> {
        let text = fs::read_to_string(path)
            .map_err(|source| Error::Read { path: path.to_owned(), source })?;
        Self::parse(&text, path)
    }

    pub(crate) fn parse(text: &str, path: &Path) -> Result<Self> {
        let wrong = |message: String| Error::Principles { path: path.to_owned(), message };
        let principles: Self = toml::from_str(text).map_err(|error| wrong(error.to_string()))?;
        principles.check().map_err(wrong)?;
        Ok(principles)
    }

    /// What the form asks for beyond the types.
    fn check(&self) -> std::result::Result<(), String> {
        self.check_texts()?;
        if self.rules.is_empty() {
            return Err("there is no rule".into());
        }
        if self.stop_strings.iter().any(String::is_empty) {
            return Err("stop_strings holds an empty text".into());
        }
        if self.black_list.iter().any(|word| word.trim().is_empty()) {
            return Err("black_list holds an empty text".into());
        }
        for (index, exemplar) in self.exemplars.iter().enumerate() {
            self.check_exemplar(index, exemplar)?;
        }
        Ok(())
    }

    fn check_texts(&self) -> std::result::Result<(), String> {
        let Self { cues, names, .. } = self;
        let texts = [
            ("title", &self.title),
            ("opening", &self.opening),
            ("examples_opening", &self.examples_opening),
            ("affirmation", &self.affirmation),
            ("cues.user", &cues.user),
            ("cues.thoughts", &cues.thoughts),
            ("cues.answer", &cues.answer),
            ("cues.clear_context", &cues.clear_context),
            ("cues.auto_reply", &cues.auto_reply),
            ("cues.auto_reply_text", &cues.auto_reply_text),
            ("names.assistant", &names.assistant),
            ("names.product", &names.product),
            ("names.maker", &names.maker),
        ];
        for (key, text) in texts {
            if text.trim().is_empty() {
                return Err(format!("{key} is empty"));
            }
            if text.trim() != text {
                return Err(format!("{key} begins or ends with white space: {text:?}"));
            }
        }
        Ok(())
    }

    fn check_exemplar(&self, index: usize, exemplar: &Exemplar) -> std::result::Result<(), String> {
        let place = format!("exemplar {} ({})", index + 1, exemplar.subject);
        if index == 0 && exemplar.continues {
            return Err(format!("{place} continues, but none stands before it"));
        }
        let input = exemplar.input.as_deref();
        let parts = [
            ("user", Some(exemplar.user.as_str())),
            ("input", input),
            ("thoughts", Some(exemplar.thoughts.as_str())),
            ("answer", Some(exemplar.answer.as_str())),
        ];
        for (key, text) in parts {
            let Some(text) = text else { continue };
            if text.trim().is_empty() {
                return Err(format!("{place}: {key} is empty"));
            }
            if let Some(cue) = self.cue_in(text) {
                return Err(format!("{place}: {key} holds the cue {cue:?}"));
            }
        }
        if exemplar.thoughts.contains("\n\n") {
            return Err(format!("{place}: thoughts are one paragraph"));
        }
        Ok(())
    }

    /// The marks that belong between turns and never inside one, the longest first.
    pub(crate) fn turn_cues(&self) -> [&str; 4] {
        let cues = &self.cues;
        [&cues.thoughts, &cues.auto_reply, &cues.answer, &cues.user]
    }

    fn cue_in(&self, text: &str) -> Option<&str> {
        self.turn_cues()
            .into_iter()
            .find(|&cue| text.lines().any(|line| line.trim_start().starts_with(cue)))
    }

    /// What stands before the exemplars.
    pub(crate) fn render_rules(&self) -> String {
        let mut text = format!("# {}\n\n## General Rules\n\n{}\n\n", self.title, self.opening);
        for (index, rule) in self.rules.iter().enumerate() {
            // Writing to a String cannot fail.
            let _ = writeln!(text, "{} ({}). {}", index + 1, rule.name, rule.text.trim());
        }
        text
    }

    /// The meta prompt: headings, rules, exemplars, and the mark of the user's next turn.
    pub fn render(&self) -> String {
        let mut text = self.render_rules();
        let _ = write!(text, "\n## Examples\n\n{}\n\n", self.examples_opening);
        for (index, exemplar) in self.exemplars.iter().enumerate() {
            if index > 0 && !exemplar.continues {
                self.render_clear_context(&mut text);
            }
            self.render_exemplar(exemplar, &mut text);
        }
        if !self.exemplars.is_empty() {
            self.render_clear_context(&mut text);
        }
        text + &self.cues.user
    }

    pub(crate) fn render_exemplar(&self, exemplar: &Exemplar, text: &mut String) {
        let Cues { user, thoughts, answer, .. } = &self.cues;
        let _ = write!(text, "{user} {}\n\n", exemplar.user.trim());
        if let Some(input) = &exemplar.input {
            let _ = write!(text, "{}\n\n", input.trim());
        }
        let affirmation = &self.affirmation;
        let _ = write!(text, "{thoughts} {affirmation} {}\n\n", exemplar.thoughts.trim());
        let _ = write!(text, "{answer} {}\n\n", exemplar.answer.trim());
    }

    fn render_clear_context(&self, text: &mut String) {
        let Cues { clear_context, auto_reply, auto_reply_text, .. } = &self.cues;
        let _ = write!(text, "{clear_context}\n\n{auto_reply} {auto_reply_text}\n\n");
    }
}

/// `--template`: what a model is asked with, and what it is to write.
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq, Serialize, Deserialize, clap::ValueEnum)]
#[serde(rename_all = "kebab-case")]
#[non_exhaustive]
pub enum Form {
    /// Stage 2: a base model behind the principles writes thoughts and then an answer.
    #[default]
    SelfAlign,
    /// Verbose cloning, the fourth stage of the first Dromedary: a trained model behind a prompt that
    /// asks for length writes an answer, which the next model learns without that prompt.
    Verbose,
}

/// The text before the user's turn, and the principles it stands for.
#[derive(Clone, Debug)]
#[non_exhaustive]
pub struct MetaPrompt {
    /// Ends in the mark of the user's turn, without white space behind it.
    pub text: String,
    /// Cues, names, stop strings and black list that go with the text.
    pub principles: Principles,
    /// Where the text is from.
    pub path: PathBuf,
    /// What stands behind the text, and what a model makes of it.
    pub form: Form,
}

impl MetaPrompt {
    /// From `--meta-prompt-file`: a `.toml` of principles is rendered, any other file is the text
    /// itself and goes with the built-in principles; none at all is the built-in text.
    ///
    /// # Errors
    /// Those of [`Principles::open`]; [`Error::MetaPrompt`] where a text does not end in the mark
    /// of the user's turn.
    pub fn open(path: Option<&Path>) -> Result<Self> {
        let Some(path) = path else {
            return Ok(Self::rendered(Principles::built_in()?, Path::new(BUILT_IN_NAME)));
        };
        if path.extension().is_some_and(|extension| extension.eq_ignore_ascii_case("toml")) {
            return Ok(Self::rendered(Principles::open(path)?, path));
        }
        let principles = Principles::built_in()?;
        let text = read_prompt(path, &principles.cues.user)?;
        Ok(Self { text, principles, path: path.to_owned(), form: Form::SelfAlign })
    }

    /// The meta prompt of a form; for [`Form::Verbose`] a text, by default
    /// `prompts/dromedary_verbose_prompt.txt`. It ends in the mark of the user's turn, a line
    /// `### User`, and has a turn of the model, which tells the mark that answers follow, such as
    /// `### Dromedary (extensive)`.
    ///
    /// # Errors
    /// Those of [`open`](Self::open); [`Error::Principles`] where the model has no turn.
    pub fn open_as(form: Form, path: Option<&Path>) -> Result<Self> {
        match form {
            Form::SelfAlign => Self::open(path),
            Form::Verbose => Self::verbose(path),
        }
    }

    fn verbose(path: Option<&Path>) -> Result<Self> {
        let (text, path) = match path {
            Some(path) => (read_prompt(path, VERBOSE_USER)?, path),
            None => (VERBOSE.trim().to_owned(), Path::new(VERBOSE_NAME)),
        };
        let mut principles = Principles::built_in()?;
        let marks = text.lines().filter(|line| line.starts_with("### ") && *line != VERBOSE_USER);
        let Some(answer) = marks.map(str::to_owned).next() else {
            let message =
                "has no turn of the model: a line such as `### Dromedary (extensive)`".to_owned();
            return Err(Error::Principles { path: path.to_owned(), message });
        };
        // The model may open a turn of its own without the remark behind its name.
        let short = answer.split(" (").next().unwrap_or(&answer).to_owned();
        principles.stop_strings = [VERBOSE_USER, &short].map(|mark| format!("\n\n{mark}")).to_vec();
        principles.cues.user = VERBOSE_USER.to_owned();
        principles.cues.thoughts = answer.clone();
        principles.cues.answer = answer;
        principles.cues.auto_reply = short;
        // It was trained on its name, and thinks and cites nothing.
        principles.names.assistant = principles.names.product.clone();
        principles.rules.clear();
        principles.exemplars.clear();
        principles.black_list.clear();
        Ok(Self { text, principles, path: path.to_owned(), form: Form::Verbose })
    }

    fn rendered(principles: Principles, path: &Path) -> Self {
        let text = principles.render();
        Self { text, principles, path: path.to_owned(), form: Form::SelfAlign }
    }
}

/// The text of a prompt that ends in a mark.
fn read_prompt(path: &Path, mark: &str) -> Result<String> {
    let text =
        fs::read_to_string(path).map_err(|source| Error::Read { path: path.to_owned(), source })?;
    let text = text.trim().to_owned();
    if text.ends_with(mark) {
        return Ok(text);
    }
    let mut end: Vec<char> = text.chars().rev().take(20).collect();
    end.reverse();
    let end = end.into_iter().collect();
    Err(Error::MetaPrompt { path: path.to_owned(), cue: mark.to_owned(), end })
}

#[cfg(test)]
mod tests {
    use super::*;

    fn changed(from: &str, to: &str) -> String {
        assert!(BUILT_IN.contains(from), "{from}");
        Principles::parse(&BUILT_IN.replacen(from, to, 1), Path::new("p.toml"))
            .unwrap_err()
            .to_string()
    }

    #[test]
    fn the_built_in_principles_have_the_form_of_the_original() {
        let principles = Principles::built_in().unwrap();
        let names: Vec<&str> = principles.rules.iter().map(|rule| rule.name.as_str()).collect();
        assert_eq!(
            names,
            [
                "ethical",
                "informative",
                "helpful",
                "question assessment",
                "reasoning",
                "multi-aspect",
                "candor",
                "knowledge recitation",
                "static",
                "clarification",
                "numerical sensitivity",
                "dated knowledge",
                "step-by-step",
                "balanced & informative perspectives",
                "creative",
                "operational",
                "multilingual"
            ]
        );
        assert_eq!(principles.exemplars.len(), 7);
        assert!(principles.exemplars[3].continues);
        assert!(principles.exemplars[2].input.is_some() && principles.exemplars[4].input.is_some());
    }

    #[test]
    fn the_rendered_text_has_the_form_of_the_original() {
        let text = Principles::built_in().unwrap().render();
        assert!(text.starts_with("# Watson\n\n## General Rules\n\n"));
        assert!(text.contains("\n1 (ethical). Watson should "));
        assert!(text.contains("\n\n## Examples\n\n"));
        assert!(text.ends_with("\n\nUser:"));
        assert_eq!(text.matches("\n\nUser: Good job! Clear context\n\n").count(), 6);
        assert_eq!(text.matches("\n\nWatson (auto reply): ").count(), 6);
        let thoughts = "\n\nWatson (internal thoughts): I am a helpful, ethical, and reliable \
                        assistant. ";
        assert_eq!(text.matches(thoughts).count(), 7);
        assert_eq!(text.matches("\n\nWatson: ").count(), 7);
        assert!(!text.contains("\n\n\n"));
    }

    #[test]
    fn each_exemplar_cites_rules_by_number_and_name_and_each_citation_is_right() {
        let principles = Principles::built_in().unwrap();
        for exemplar in &principles.exemplars {
            let cited = principles.rules.iter().enumerate().filter(|(index, rule)| {
                exemplar.thoughts.contains(&format!("{} ({})", index + 1, rule.name))
            });
            let marks = exemplar.thoughts.matches(" (").count();
            assert_eq!(cited.count(), marks, "{}", exemplar.thoughts);
            assert!(marks >= 2, "{}", exemplar.subject);
        }
    }

    #[test]
    fn each_word_of_the_black_list_is_from_an_exemplar() {
        let principles = Principles::built_in().unwrap();
        let text = principles.render();
        for word in &principles.black_list {
            let known = text.contains(word.as_str()) || text.contains(&format!("{word}s"));
            assert!(known, "{word}");
        }
    }

    #[test]
    fn broken_principles_are_refused_with_the_place() {
        assert!(changed("title = \"Watson\"", "titel = \"Watson\"").contains("titel"));
        assert!(changed("user = \"User:\"", "user = \"\"").contains("cues.user is empty"));
        assert!(changed("user = \"User:\"", "user = \"User: \"").contains("white space"));
        let cue = "answer = \"I cannot tell you\n\nUser: which";
        assert!(
            changed("answer = \"I cannot tell you which", &cue.replace('\n', "\\n"))
                .contains("exemplar 1 (a date after the end of the training data): answer holds")
        );
        let first = "subject = \"a date after the end of the training data\"";
        assert!(
            changed(first, &format!("{first}\ncontinues = true")).contains("none stands before")
        );
        assert!(changed("stop_strings = [\"", "stop_strings = [\"\", \"").contains("stop_strings"));
    }

    #[test]
    fn a_text_replaces_the_rendered_text_only() {
        let folder = tempfile::tempdir().unwrap();
        let path = folder.path().join("prompt.txt");
        fs::write(&path, "\n# Watson\n\nRules.\n\nUser:\n").unwrap();
        let prompt = MetaPrompt::open(Some(&path)).unwrap();
        assert_eq!(prompt.text, "# Watson\n\nRules.\n\nUser:");
        assert_eq!(prompt.principles, Principles::built_in().unwrap());

        fs::write(&path, "# Watson\n\nRules.").unwrap();
        let message = MetaPrompt::open(Some(&path)).unwrap_err().to_string();
        assert!(message.contains("prompt.txt") && message.contains("Rules."), "{message}");
    }

    #[test]
    fn a_verbose_prompt_tells_its_own_marks() {
        let prompt = MetaPrompt::open_as(Form::Verbose, None).unwrap();
        assert!(prompt.text.ends_with("\n\n### User"));
        let cues = &prompt.principles.cues;
        assert_eq!(
            (cues.user.as_str(), cues.answer.as_str()),
            ("### User", "### Dromedary (extensive)")
        );
        assert_eq!(prompt.principles.stop_strings, ["\n\n### User", "\n\n### Dromedary"]);

        let folder = tempfile::tempdir().unwrap();
        let path = folder.path().join("long.txt");
        let open = |text: &str| {
            fs::write(&path, text).unwrap();
            MetaPrompt::open_as(Form::Verbose, Some(&path))
        };
        let own = open("### User\nHi.\n\n### Ada (at length)\nHello.\n\n### User\n").unwrap();
        assert_eq!(own.principles.cues.answer, "### Ada (at length)");
        assert!(open("### User\n").unwrap_err().to_string().contains("has no turn of the model"));
        assert!(open("### Ada\n").unwrap_err().to_string().contains("### User"));
    }

    #[test]
    fn principles_without_exemplars_still_end_in_the_users_turn() {
        let mut principles = Principles::built_in().unwrap();
        principles.exemplars.clear();
        assert!(principles.check().is_ok());
        assert!(principles.render().ends_with("answers:\n\nUser:"));
    }
}
