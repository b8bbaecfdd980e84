//! Lines that are conversations.

use std::path::Path;

use lora_model::tokenizer::chat::Message;
use serde_json::{Map, Value};

use super::read::kind;
use super::{Content, Error, Result};

/// The key of a line that is a conversation.
pub(super) const MESSAGES: &str = "messages";

/// Who may speak. What a template makes of each is its own affair.
const ROLES: [&str; 5] = ["system", "developer", "user", "assistant", "tool"];

/// The conversation of a line that has `messages`; `whole`: the assistant has to say something.
pub(super) fn conversation(path: &Path, line: usize, object: &Map<String, Value>, whole: bool) -> Result<Content> {
    let bad = |problem: String| Error::Chat { path: path.to_owned(), line, problem };
    if let Some(key) = ["prompt", "completion", "text"].into_iter().find(|key| object.contains_key(*key)) {
        return Err(bad(format!("both \"{MESSAGES}\" and \"{key}\" are there; which is meant? Remove one")));
    }
    if object.get("tools").is_some_and(|tools| !tools.is_null() && tools.as_array().is_none_or(|t| !t.is_empty())) {
        return Err(bad("\"tools\" are not given to templates here, so the line would be another; remove them".into()));
    }
    let list = match &object[MESSAGES] {
        Value::Array(list) if !list.is_empty() => list,
        Value::Array(_) => return Err(bad(format!("\"{MESSAGES}\" is empty; delete the line"))),
        other => {
            let found = kind(other);
            let wanted = "a list of messages such as {\"role\": \"user\", \"content\": \"Hello\"}";
            return Err(bad(format!("\"{MESSAGES}\" is {found} in place of {wanted}")));
        }
    };
    let parsed = list.iter().enumerate();
    let parsed = parsed.map(|(i, m)| message(m).map_err(|problem| bad(format!("message {}: {problem}", i + 1))));
    let messages: Vec<Message> = parsed.collect::<Result<_>>()?;
    if !whole {
        return match unanswered(&messages) {
            [] => Err(bad("the assistant has the only message, so there is nothing to answer; add a user's".into())),
            _ => Ok(Content::Chat(messages)),
        };
    }
    if !messages.iter().any(Message::is_assistant) {
        let problem =
            "no message has the role \"assistant\", so there is nothing to learn; add its answer or delete the line";
        return Err(bad(problem.into()));
    }
    let silent =
        |m: &Message| m.is_assistant() && m.more.is_empty() && m.content.as_deref().unwrap_or("").trim().is_empty();
    match messages.iter().position(silent) {
        Some(i) => {
            Err(bad(format!("message {}: the assistant says nothing; fill in its \"content\" or delete it", i + 1)))
        }
        None => Ok(Content::Chat(messages)),
    }
}

/// The messages before the assistant's next turn: all but a last one that is such a turn already.
pub fn unanswered(messages: &[Message]) -> &[Message] {
    match messages.split_last() {
        Some((last, before)) if last.is_assistant() => before,
        _ => messages,
    }
}

fn message(value: &Value) -> std::result::Result<Message, String> {
    let Value::Object(map) = value else { return Err(format!("it is {} in place of an object", kind(value))) };
    let mut more = map.clone();
    let role = match more.shift_remove("role") {
        Some(Value::String(role)) => role,
        Some(other) => return Err(format!("\"role\" is {} in place of a string", kind(&other))),
        None => {
            let keys: Vec<String> = map.keys().take(8).map(|k| format!("\"{k}\"")).collect();
            let hint = if map.contains_key("from") {
                "; rename \"from\" and \"value\" to \"role\" and \"content\""
            } else {
                ""
            };
            return Err(format!("no \"role\" among its keys {}{hint}", keys.join(", ")));
        }
    };
    if !ROLES.contains(&role.as_str()) {
        return Err(format!("the role \"{role}\" is none of {}; rename it", ROLES.join(", ")));
    }
    let content = match more.shift_remove("content") {
        Some(Value::String(text)) => Some(text),
        Some(Value::Array(parts)) => Some(parts.iter().map(part).collect::<std::result::Result<String, _>>()?),
        None | Some(Value::Null) if more.get("tool_calls").is_some_and(|calls| !calls.is_null()) => None,
        None => return Err("no \"content\"; write what is said as a string".into()),
        Some(other) => return Err(format!("\"content\" is {} in place of a string", kind(&other))),
    };
    more.retain(|_, value| !value.is_null());
    Ok(Message { role, content, more })
}

/// The text of a part of a content that comes in parts.
fn part(part: &Value) -> std::result::Result<&str, String> {
    match (part["type"].as_str(), part["text"].as_str()) {
        (Some("text"), Some(text)) => Ok(text),
        (Some(other), _) if other != "text" => {
            Err(format!("\"content\" has a part of type \"{other}\"; only texts can be learned"))
        }
        _ => Err("\"content\" has a part that is not {\"type\": \"text\", \"text\": …}".into()),
    }
}
