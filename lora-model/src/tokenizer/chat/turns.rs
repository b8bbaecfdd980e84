//! Which part of a rendered conversation is the assistant's.

use std::ops::Range;

use serde_json::Value;

use super::{ChatTemplate, Message, jinja::MARKS};
use crate::Result;

/// A rendered conversation.
pub(super) struct Rendered {
    pub(super) text: String,
    /// What the assistant says in it, in bytes; ascending and apart.
    pub(super) turns: Vec<Range<usize>>,
}

/// What thoughts begin and end with, in templates that have them.
const THOUGHTS: [&str; 2] = ["<think>", "</think>"];

impl ChatTemplate {
    /// The conversation with the blocks that the template itself marks.
    pub(super) fn marked_turns(&self, messages: &[Message]) -> Result<Rendered> {
        if messages.iter().any(|m| Value::Object(m.for_template()).to_string().contains(MARKS)) {
            let problem = "a message holds U+FDD0 or U+FDD1, which are no characters of any text; remove them";
            return Err(self.error(None, problem.to_owned()));
        }
        let marked = self.render_marked(messages, false)?;
        let (mut text, mut turns, mut open, mut start) = (String::with_capacity(marked.len()), Vec::new(), 0, 0);
        for c in marked.chars() {
            if c == MARKS[0] {
                start = if open == 0 { text.len() } else { start };
                open += 1;
            } else if c == MARKS[1] {
                open -= 1;
                turns.extend((open == 0 && start < text.len()).then_some(start..text.len()));
            } else {
                text.push(c);
            }
        }
        match turns.is_empty() {
            false => Ok(Rendered { text, turns }),
            true => Err(self.error(None, "its {% generation %} blocks hold nothing of this conversation".to_owned())),
        }
    }

    /// The conversation with turns that are found by rendering its beginnings. For a turn after `messages[..i]`
    ///
    /// ```text
    /// start = |render(messages[..i], with the generation prompt)|     what the model is given
    /// end   = |render(messages[..=i])|                                what it is to add
    /// ```
    /// where both texts are beginnings of the whole conversation. Three things may differ: the prompt may open thoughts that
    /// the turn in the conversation does not have, a turn that is not the last may lose its beginning, its thoughts, and
    /// a template may close all of a conversation with `eos_token`, which is then nobody's.
    pub(super) fn found_turns(&self, messages: &[Message]) -> Result<Rendered> {
        let whole = self.render(messages, false)?;
        let mut turns: Vec<Range<usize>> = Vec::new();
        let closing = self.closing(messages)?;
        let open = |text: &str| text.len() - if text.ends_with(closing) { closing.len() } else { 0 };
        for (i, message) in messages.iter().enumerate().filter(|(_, m)| m.is_assistant()) {
            let differs = |what: &str| {
                let turn = turns.len() + 1;
                let problem = format!(
                    "turn {turn} of the assistant cannot be told from the rest: {what}; put {{% generation %}} and \
                     {{% endgeneration %}} around what the assistant says in the template"
                );
                self.error(None, problem)
            };
            let before = match (i, self.render(&messages[..i], true)) {
                (_, Ok(before)) => before,
                (0, Err(_)) => return Err(differs("no message stands before it, and the template needs one")),
                (_, Err(e)) => return Err(e),
            };
            let given = (whole.starts_with(&before).then_some(before.as_str()))
                .or_else(|| without_thoughts(&before).filter(|given| whole.starts_with(given)));
            let Some(start) = given.map(str::len) else {
                return Err(differs("what the template writes before it is another text without it"));
            };
            let alone = match i + 1 == messages.len() {
                true => whole.clone(),
                false => self.render(&messages[..=i], false)?,
            };
            let said = message.content.as_deref().unwrap_or_default();
            let alone = &alone[..open(&alone)];
            let added = alone.strip_prefix(&whole[..start]).and_then(|alone| kept(alone, &whole[start..], said));
            let Some(added) = added else {
                return Err(differs("the template writes another text when the conversation goes on after it"));
            };
            if added == 0 || turns.last().is_some_and(|last| last.end > start) {
                return Err(differs("the template writes nothing for it alone"));
            }
            turns.push(start..start + added);
        }
        Ok(Rendered { text: whole, turns })
    }
}

impl ChatTemplate {
    /// What the template writes after the last message, whoever has it: nothing, or `eos_token`.
    fn closing(&self, messages: &[Message]) -> Result<&str> {
        let eos = self.special.get("eos_token").and_then(|token| token.as_str()).unwrap_or_default();
        // Before a turn, where the generation prompt shows how the text would go on.
        let Some(i) = messages.iter().position(Message::is_assistant).filter(|i| *i > 0) else { return Ok("") };
        let (before, prompt) = (self.render(&messages[..i], false)?, self.render(&messages[..i], true)?);
        let closed = before.strip_suffix(eos).is_some_and(|open| prompt.starts_with(open));
        Ok(if closed && !prompt.starts_with(&before) { eos } else { "" })
    }
}

/// A generation prompt up to the thoughts that it opens, if it does.
fn without_thoughts(prompt: &str) -> Option<&str> {
    let open = prompt.trim_end();
    open.strip_suffix(THOUGHTS[1]).unwrap_or(open).trim_end().strip_suffix(THOUGHTS[0])
}

/// How many bytes of `whole` the turn is that was rendered `alone`: all of it, or else the longest of its ends that `whole`
/// begins with and that still has what was said.
fn kept(alone: &str, whole: &str, said: &str) -> Option<usize> {
    let said = said.rsplit(THOUGHTS[1]).next().unwrap_or_default().trim();
    let ends = alone.char_indices().map(|(at, _)| &alone[at..]);
    let mut ends = ends.take_while(|end| end.contains(said));
    ends.find(|end| whole.starts_with(end)).map(str::len).or(alone.is_empty().then_some(0))
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn what_is_kept_of_a_turn() {
        let table = [
            ("hi</s>\n", "hi</s>\n[INST]", "hi", Some(7)),
            ("<think>\n\n</think>\n\nhi</s>\n", "hi</s>\n<user>", "hi", Some(7)),
            ("<think>\na\n</think>\n\nhi</s>", "hi</s>hi</s>", "<think>\na\n</think>\n\nhi ", Some(6)),
            // Not even the end of what was said is there.
            ("hi</s>\n", "\n</s>", "hi", None),
            ("hi</s>", "ho</s>", "hi", None),
            ("", "x", "", Some(0)),
        ];
        for (alone, whole, said, bytes) in table {
            assert_eq!(kept(alone, whole, said), bytes, "{alone:?} in {whole:?}");
        }
        assert_eq!(without_thoughts("<a><think>\n"), Some("<a>"));
        assert_eq!(without_thoughts("<a><think>\n\n</think>\n\n"), Some("<a>"));
        assert_eq!(without_thoughts("<a>\n"), None);
    }
}
