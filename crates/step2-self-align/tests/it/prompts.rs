use std::fs;
use std::path::{Path, PathBuf};

use dromedary_self_align::{MetaPrompt, Template};
use dromedary_tokenizer::Tokenizer;

use crate::support::{SHORT_PROMPT, root, stories260k};

/// A tokenizer that may not be committed, or `None` where its folder is not named.
fn real_tokenizer(file: &str) -> Option<Tokenizer> {
    let folder = std::env::var_os("DROMEDARY_TOKENIZERS").map(PathBuf::from);
    let path = folder.map(|folder| folder.join(file)).filter(|path| path.exists());
    let required =
        std::env::var_os("DROMEDARY_REQUIRE_TEST_DATA").is_some_and(|value| value == "1");
    match path {
        Some(path) => Some(Tokenizer::open(path).unwrap()),
        None if required => panic!("DROMEDARY_TOKENIZERS names no folder with {file}"),
        None => {
            eprintln!("skipped: {file}, because DROMEDARY_TOKENIZERS names no folder with it");
            None
        }
    }
}

fn meta_prompt(text: &str) -> MetaPrompt {
    let folder = tempfile::tempdir().unwrap();
    let path = folder.path().join("prompt.txt");
    fs::write(&path, text).unwrap();
    MetaPrompt::open(Some(&path)).unwrap()
}

#[test]
fn prompts_with_and_without_input_have_the_form_of_the_original() {
    let template = Template::new(&meta_prompt(SHORT_PROMPT));
    assert_eq!(template.fill("Why?", ""), "Be good.\n\nUser: Why?\n\nWatson (internal thoughts):");
    assert_eq!(
        template.fill("Sum up.", "A text."),
        "Be good.\n\nUser: Sum up.\n\nA text.\n\nWatson (internal thoughts):"
    );
}

#[test]
fn every_prompt_begins_with_the_shared_prefix_and_has_tokens_of_its_own() {
    let tokenizer = Tokenizer::open(stories260k()).unwrap();
    for text in [MetaPrompt::open(None).unwrap(), meta_prompt(SHORT_PROMPT)] {
        let template = Template::new(&text);
        let prefix = template.shared_prefix(&tokenizer);
        let alone = tokenizer.len_with_bos(&text.text);
        assert!(prefix.len() <= alone && prefix.len() + 2 >= alone, "{} of {alone}", prefix.len());
        for instruction in
            ["Why?", "42", "\u{4f60}\u{597d}", "\u{1f680}", "\"x\"", "\tx", " ", "Be good."]
        {
            let tokens = tokenizer.encode_with_bos(&template.fill(instruction, ""));
            assert!(tokens.starts_with(&prefix), "{instruction:?}");
            assert!(tokens.len() > prefix.len());
        }
    }
}

#[test]
fn the_built_in_prompt_fits_the_shared_prefix_of_the_original() {
    let text = MetaPrompt::open(None).unwrap().text;
    for (file, expected) in [("smollm2.json", 2200..=2600), ("llama.json", 2200..=2816)] {
        let Some(tokenizer) = real_tokenizer(file) else { continue };
        let tokens = tokenizer.len_with_bos(&text);
        assert!(expected.contains(&tokens), "{file}: {tokens}");
    }
    // Without them: English has four characters a token with either, and CJK has less than one.
    let ascii = text.chars().filter(char::is_ascii).count();
    assert!(ascii / 4 + (text.chars().count() - ascii) * 2 < 2816, "{ascii}");
}

fn text(name: &str) -> String {
    fs::read_to_string(root().join("prompts").join(name)).unwrap()
}

#[test]
fn prompts_for_the_trained_model_have_the_form_of_the_original() {
    for (name, turns) in [
        ("dromedary_concise_prompt_distill.txt", 0),
        ("dromedary_standard_prompt_distill.txt", 1),
        ("dromedary_verbose_prompt.txt", 1),
        ("dromedary_multilingual_prompt.txt", 3),
    ] {
        let text = text(name);
        assert!(text.starts_with("# Dromedary\n\n## System Overview\n\nDromedary is "), "{name}");
        assert!(text.ends_with("\n\n### User\n"), "{name}");
        let (overview, talk) = text.split_once("\n\n## User Conversation\n\n### User\n").unwrap();
        assert_eq!(overview.matches("\n\n").count(), 2, "{name}: one paragraph");
        let maker = &MetaPrompt::open(None).unwrap().principles.names.maker;
        for word in [maker.as_str(), "helpful", "ethical", "reliable", "up to"] {
            assert!(overview.contains(word), "{name}: {word}");
        }
        assert_eq!(talk.matches("### Dromedary").count(), turns, "{name}");
    }
}

#[test]
fn the_readme_names_every_prompt() {
    let readme = text("README.md");
    let names = fs::read_dir(root().join("prompts")).unwrap();
    for name in names.map(|entry| entry.unwrap().file_name().into_string().unwrap()) {
        let known = name == "README.md" || readme.contains(&format!("`{name}`"));
        assert!(known, "{}", Path::new(&name).display());
    }
}
