//! Chat templates against Transformers: texts, tokens and what is the assistant's. `golden/chat.py` wrote what it says.

use std::{fs, path::Path};

use lora_model::{
    Error,
    tokenizer::{
        Tokenizer,
        chat::{ChatTemplate, Conversation, Message},
    },
};
use serde::Deserialize;
use serde_json::{Map, Value, json};
use tempfile::TempDir;

#[derive(Deserialize)]
struct Golden {
    templates: Vec<Template>,
    cases: Vec<Case>,
}

#[derive(Deserialize)]
struct Template {
    name: String,
    tokenizer: String,
    tokens: Map<String, Value>,
    plain: String,
    marked: String,
}

#[derive(Deserialize)]
struct Case {
    template: String,
    messages: Vec<Map<String, Value>>,
    #[serde(flatten)]
    said: Said,
}

/// What Transformers says of a case.
#[derive(Deserialize)]
#[serde(untagged)]
enum Said {
    Error { error: String },
    Text { text: String, prompt: String, ids: Vec<u32>, turns: Vec<(usize, usize)> },
}

fn golden() -> Golden {
    serde_json::from_str(include_str!("../golden/chat/golden.json")).unwrap()
}

/// A folder with one of the small tokenizers and these other files.
fn folder(tokenizer: &str, files: &[(&str, &str)]) -> TempDir {
    let dir = tempfile::tempdir().unwrap();
    let golden = Path::new(env!("CARGO_MANIFEST_DIR")).join("tests/golden/chat");
    fs::copy(golden.join(format!("{tokenizer}.json")), dir.path().join("tokenizer.json")).unwrap();
    files.iter().for_each(|(name, text)| fs::write(dir.path().join(name), text).unwrap());
    dir
}

fn open(dir: &TempDir) -> (ChatTemplate, Tokenizer) {
    (ChatTemplate::from_dir(dir.path()).unwrap(), Tokenizer::from_dir(dir.path()).unwrap())
}

fn messages(maps: &[Map<String, Value>]) -> Vec<Message> {
    let message = |map: &Map<String, Value>| {
        let mut more = map.clone();
        let role = more.shift_remove("role").unwrap().as_str().unwrap().to_owned();
        let content = more.shift_remove("content").map(|c| c.as_str().unwrap().to_owned());
        Message { role, content, more }
    };
    maps.iter().map(message).collect()
}

#[test]
fn conversations_are_those_of_transformers() {
    let Golden { templates, cases } = golden();
    assert_eq!(templates.len(), 9);
    for Template { name, tokenizer, tokens, plain, marked } in templates {
        // Each of the places where a template may be, and of those where tokens are named.
        let list = json!([{"name": "tools", "template": "no"}, {"name": "default", "template": marked}]);
        let config = |template: Value| {
            let mut config = tokens.clone();
            config.insert("chat_template".to_owned(), template);
            Value::Object(config).to_string()
        };
        let map: Map<String, Value> =
            tokens.iter().map(|(k, v)| (k.clone(), json!({"content": v, "lstrip": false}))).collect();
        let map = Value::Object(map).to_string();
        let file = config("not this one".into());
        let folders = [
            folder(&tokenizer, &[("chat_template.jinja", &plain), ("tokenizer_config.json", &file)]),
            folder(&tokenizer, &[("tokenizer_config.json", &config(plain.clone().into()))]),
            folder(&tokenizer, &[("tokenizer_config.json", &config(list))]),
            folder(
                &tokenizer,
                &[("chat_template.jinja", &marked.replace('\n', "\r\n")), ("special_tokens_map.json", &map)],
            ),
        ];
        for (i, dir) in folders.iter().enumerate() {
            let (template, tokenizer) = open(dir);
            for (j, case) in cases.iter().filter(|c| c.template == name).enumerate() {
                let place = format!("{name}, folder {i}, conversation {j}");
                let messages = messages(&case.messages);
                let (text, prompt, ids, turns) = match &case.said {
                    Said::Text { text, prompt, ids, turns } => (text, prompt, ids, turns),
                    Said::Error { error } => {
                        let found = template.render(&messages, false).unwrap_err().to_string();
                        assert!(found.contains(error), "{place}: {found}");
                        continue;
                    }
                };
                assert_eq!(&template.render(&messages, false).unwrap(), text, "{place}");
                let asked = template.prompt(&tokenizer, &messages).unwrap();
                assert_eq!((&asked.text, asked.tokens), (prompt, tokenizer.encode(prompt).unwrap()), "{place}");
                let found = template.encode(&tokenizer, &messages);
                if i < 2
                    && let Some(why) = refused(&name, &messages)
                {
                    let error = found.unwrap_err().to_string();
                    assert!(error.contains(why) && error.contains("{% generation %}"), "{place}: {error}");
                    continue;
                }
                let turns = turns.iter().map(|&(from, to)| from..to).collect();
                assert_eq!(found.unwrap(), Conversation { tokens: ids.clone(), turns }, "{place}: {text}");
            }
        }
    }
}

/// Why turns cannot be found in a template without marks.
fn refused(template: &str, messages: &[Message]) -> Option<&'static str> {
    match template {
        // Like Mistral's, it drops what the system says where the user has not the last word.
        "mistral" if messages[0].role == "system" => Some("before it is another text"),
        // It writes things after the last message that tell of all.
        "much" => Some("turn 1 of the assistant"),
        _ => None,
    }
}

#[test]
fn the_end_of_a_turn_is_the_templates() {
    let ends = [
        ("chatml", Some("<|im_end|>")),
        ("llama3", Some("<|eot|>")),
        ("mistral", Some("</s>")),
        ("thinking", Some("<|im_end|>")),
        ("opened", Some("</s>")),
        ("closed", Some("<|eot|>")),
        ("plain", None),
    ];
    let Golden { templates, .. } = golden();
    for (name, end) in ends {
        let t = templates.iter().find(|t| t.name == name).unwrap();
        // Where the marks leave the end out, it is the token after them.
        let outside = t.marked.replace("<|im_end|>{% endgeneration %}", "{% endgeneration %}<|im_end|>");
        for source in [&t.plain, &t.marked, &outside] {
            let config = Value::Object(t.tokens.clone()).to_string();
            let dir = folder(&t.tokenizer, &[("chat_template.jinja", source), ("tokenizer_config.json", &config)]);
            let (template, tokenizer) = open(&dir);
            let prompt = template.prompt(&tokenizer, &[Message::new("user", "Hi")]).unwrap();
            assert_eq!(prompt.end_of_turn, end.map(|e| tokenizer.token_id(e).unwrap()), "{name}: {source}");
        }
    }
}

#[test]
fn what_is_wrong_with_a_template_is_told_with_its_place() {
    let chat = [Message::new("user", "Hi"), Message::new("assistant", "Ho")];
    let config = |template: Value| json!({"chat_template": template}).to_string();
    type Files<'a> = &'a [(&'a str, &'a str)];
    let nested = format!("{{{{ {}1 }}}}", "1+".repeat(100_000));
    let cases: &[(Files, &[&str])] = &[
        (&[], &["no chat template", "chat_template.jinja", "tokenizer_config.json"]),
        (&[("tokenizer_config.json", "{}")], &["no chat template"]),
        (&[("tokenizer_config.json", &config(json!(3)))], &["tokenizer_config.json", "chat_template", "string"]),
        (
            &[("tokenizer_config.json", &config(json!([{"name": "rag", "template": ""}])))],
            &["\"default\"", "found rag"],
        ),
        (&[("chat_template.jinja", "{% for m in messages %}\n{{ m.content }")], &["chat_template.jinja", "line 2"]),
        (&[("chat_template.jinja", "a\n\n{{ messages[9].content }}")], &["chat_template.jinja", "line 3", "undefined"]),
        (&[("chat_template.jinja", "a\n{{ 'x'.nothing() }}")], &["line 2", "nothing"]),
        (
            &[("chat_template.jinja", "{{ raise_exception('only ' ~ messages[0].role ~ 's') }}")],
            &["line 1", "the template refuses the conversation: only users"],
        ),
        (&[("chat_template.jinja", "{{ strftime_now('%K') }}")], &["line 1", "strftime_now(\"%K\")"]),
        (&[("chat_template.jinja", "{{ messages | tojson(indent=3000000000) }}")], &["line 1", "at most 64"]),
        (&[("chat_template.jinja", &nested)], &["chat_template.jinja", "a template of 200007 bytes"]),
        (&[("chat_template.jinja", "nothing is said")], &["turn 1", "writes nothing for it"]),
        (&[("chat_template.jinja", "{% generation %}{% endgeneration %}")], &["hold nothing"]),
        (
            &[("chat_template.jinja", "{% for m in messages %}{{ messages | length }}{{ m.content }}{% endfor %}")],
            &["turn 1", "another text without it"],
        ),
        (
            &[(
                "chat_template.jinja",
                "{% for m in messages %}{{ m.content }}{% if loop.last and loop.index == 2 %}!{% endif %}{% endfor %}",
            )],
            &["turn 1", "goes on after it"],
        ),
    ];
    let more = [&chat[..], &[Message::new("user", "x"), Message::new("assistant", "y")]].concat();
    for (files, parts) in cases {
        let dir = folder("bytes", files);
        let tokenizer = Tokenizer::from_dir(dir.path()).unwrap();
        let found = ChatTemplate::from_dir(dir.path()).and_then(|t| t.encode(&tokenizer, &more));
        let error = found.expect_err(&format!("{files:?}"));
        assert!(matches!(error, Error::ChatTemplate { .. } | Error::Config { .. }), "{error:?}");
        let error = error.to_string();
        assert!(error.contains(dir.path().to_str().unwrap()), "{error}");
        parts.iter().for_each(|part| assert!(error.contains(part), "no {part:?} in {error}"));
    }
}

#[test]
fn a_conversation_that_the_assistant_begins() {
    let hello = [Message::new("assistant", "Hello"), Message::new("user", "Hi")];
    let source = "{% for m in messages %}<|user|>{{ m.content }}</s>{% endfor %}";
    let (template, tokenizer) = open(&folder("bytes", &[("chat_template.jinja", source)]));
    assert_eq!(template.encode(&tokenizer, &hello).unwrap().turns.len(), 1);
    let source = "{{ messages[0].content[0] }}".to_owned() + source;
    let (template, tokenizer) = open(&folder("bytes", &[("chat_template.jinja", &source)]));
    let error = template.encode(&tokenizer, &hello).unwrap_err().to_string();
    assert!(error.contains("turn 1") && error.contains("no message stands before it"), "{error}");
}

#[test]
fn the_time_is_now() {
    let (template, _) = open(&folder("bytes", &[("chat_template.jinja", "{{ strftime_now('%d %b %Y, %H:%M') }}")]));
    let text = template.render(&[], false).unwrap();
    let digits = text.chars().filter(char::is_ascii_digit).count();
    assert!(digits == 10 && text.len() == "24 Nov 2025, 15:42".len() && text.contains(" 20"), "{text}");
}
