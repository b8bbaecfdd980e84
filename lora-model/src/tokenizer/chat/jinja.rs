//! Jinja as Transformers sets it up for chat templates, on minijinja.

use minijinja::{
    AutoEscape, Environment, Error, ErrorKind, State, Value, context,
    syntax::SyntaxConfig,
    value::{Kwargs, Serde, ValueKind, from_args},
};
use minijinja_contrib::pycompat;

use super::python;

/// Name of the template in its environment.
pub(super) const NAME: &str = "chat";

/// What begins and ends the text of a `{% generation %}` block until it is rendered: characters that Unicode keeps for a
/// program's own use, so no text holds them.
pub(super) const MARKS: [char; 2] = ['\u{fdd0}', '\u{fdd1}'];

/// The filter that `{% generation %}` becomes. (A call of a macro, Transformers' own way, does not see every variable in
/// minijinja.)
const GENERATION: &str = "__generation__";

/// An environment with a chat template in it, and whether the template has `{% generation %}` blocks.
///
/// As in Transformers: `trim_blocks`, `lstrip_blocks`, loop controls, Python's methods of strings and dictionaries, nothing
/// escaped, `tojson` as Python's `json.dumps`, `raise_exception`, `strftime_now`, and the blocks that mark what the
/// assistant says.
pub(super) fn environment(source: &str) -> Result<(Environment<'static>, bool), Error> {
    // Of those that are published the largest has 20 KB. One that nests a hundred thousand expressions has no end that a stack
    // could hold.
    const LONGEST: usize = 1 << 17;
    if source.len() > LONGEST {
        let why = format!("a template of {} bytes; the longest that is read has {LONGEST}", source.len());
        return Err(Error::new(ErrorKind::SyntaxError, why));
    }
    let mut env = Environment::new();
    env.set_syntax(SyntaxConfig::builder().trim_blocks(true).lstrip_blocks(true).build()?);
    env.set_auto_escape_callback(|_| AutoEscape::None);
    env.set_unknown_method_callback(method);
    // In Python nothing can be gone through in `none`, which is what `tools` are here, and texts have an order.
    env.add_test("iterable", |value: &Value| !value.is_none() && value.try_iter().is_ok());
    env.add_test("sequence", |value: &Value| {
        matches!(value.kind(), ValueKind::Seq | ValueKind::String | ValueKind::Map)
    });
    env.add_filter("tojson", tojson);
    env.add_function("raise_exception", raise_exception);
    env.add_function("strftime_now", strftime_now);
    env.add_filter(GENERATION, |said: String| format!("{}{said}{}", MARKS[0], MARKS[1]));
    let (source, marks) = with_filters(&source.replace("\r\n", "\n"));
    env.add_template_owned(NAME, source)?;
    Ok((env, marks))
}

/// Why a template raised an exception of its own.
#[derive(Debug, thiserror::Error)]
#[error("{0}")]
pub(super) struct Raised(pub(super) String);

fn raise_exception(message: String) -> Result<Value, Error> {
    Err(Error::new(ErrorKind::InvalidOperation, message.clone()).with_source(Raised(message)))
}

/// The time as Python's `strftime` writes it: the local one, or for builds that are to be repeated the seconds that
/// `SOURCE_DATE_EPOCH` counts, in UTC.
fn strftime_now(format: &str) -> Result<String, Error> {
    let bad = |e: jiff::Error| Error::new(ErrorKind::InvalidOperation, format!("strftime_now({format:?}): {e}"));
    let fixed = std::env::var("SOURCE_DATE_EPOCH").ok().and_then(|seconds| seconds.parse().ok());
    let now = match fixed {
        Some(seconds) => jiff::Timestamp::from_second(seconds).map_err(bad)?.to_zoned_datetime(jiff::tz::TimeZone::UTC),
        None => jiff::ZonedDateTime::now(),
    };
    jiff::fmt::strtime::format(format, &now).map_err(bad)
}

fn tojson(value: Value, options: Kwargs) -> Result<String, Error> {
    const WIDEST: usize = 64;
    let indent: Option<usize> = options.get("indent")?;
    if indent.is_some_and(|n| n > WIDEST) {
        return Err(Error::new(ErrorKind::InvalidOperation, format!("tojson indents by at most {WIDEST}")));
    }
    let separators: Option<Vec<String>> = options.get("separators")?;
    let ascii: Option<bool> = options.get("ensure_ascii")?;
    let sorted: Option<bool> = options.get("sort_keys")?;
    options.assert_all_used()?;
    let value = serde_json::to_value(&value).map_err(|e| Error::new(ErrorKind::BadSerialization, e.to_string()))?;
    let pair = separators.map(<[String; 2]>::try_from).transpose();
    let separators = pair.map_err(|_| Error::new(ErrorKind::InvalidOperation, "separators are two strings"))?;
    let default = [if indent.is_some() { "," } else { ", " }, ": "].map(str::to_owned);
    let style = python::Json {
        indent,
        separators: separators.unwrap_or(default),
        ascii: ascii == Some(true),
        sorted: sorted == Some(true),
    };
    Ok(style.dumps(&value))
}

/// The arguments of Python's `split` and `rsplit`.
fn split_args(args: &[Value]) -> Result<(Option<&str>, Option<i64>), Error> {
    let (sep, most, named): (Option<&str>, Option<i64>, Kwargs) = from_args(args)?;
    let most = match most {
        None => named.get("maxsplit")?,
        most => most,
    };
    named.assert_all_used()?;
    Ok((sep, most))
}

/// Methods of Python that minijinja's own collection lacks, and that collection.
fn method(state: &mut State, value: &Value, method: &str, args: &[Value]) -> Result<Value, Error> {
    let Some(s) = value.as_str() else { return pycompat::unknown_method_callback(state, value, method, args) };
    Ok(match method {
        "removeprefix" => {
            let (prefix,): (&str,) = from_args(args)?;
            Value::from(s.strip_prefix(prefix).unwrap_or(s))
        }
        "removesuffix" => {
            let (suffix,): (&str,) = from_args(args)?;
            Value::from(s.strip_suffix(suffix).unwrap_or(s))
        }
        "partition" => {
            let (sep,): (&str,) = from_args(args)?;
            let (before, after) = s.split_once(sep).unwrap_or((s, ""));
            Value::from_iter([before, if s.contains(sep) { sep } else { "" }, after])
        }
        "rpartition" => {
            let (sep,): (&str,) = from_args(args)?;
            let (before, after) = s.rsplit_once(sep).unwrap_or(("", s));
            Value::from_iter([before, if s.contains(sep) { sep } else { "" }, after])
        }
        "split" if args.last().is_some_and(Value::is_kwargs) => {
            let (sep, most) = split_args(args)?;
            let args = [Value::from(sep), Value::from(most.unwrap_or(-1))];
            return pycompat::unknown_method_callback(state, value, method, &args);
        }
        "rsplit" => {
            let (sep, most) = split_args(args)?;
            let sep = sep.ok_or_else(|| Error::new(ErrorKind::MissingArgument, "rsplit wants a separator here"))?;
            let mut parts: Vec<&str> = match most.and_then(|n| usize::try_from(n).ok()) {
                Some(n) => s.rsplitn(n.saturating_add(1), sep).collect(),
                None => s.rsplit(sep).collect(),
            };
            parts.reverse();
            Value::from_iter(parts)
        }
        _ => return pycompat::unknown_method_callback(state, value, method, args),
    })
}

/// The template with `{% generation %}` blocks, Transformers' extension of Jinja, as a filter in which variables are set for
/// the block alone: lines, and the signs that strip white space, stay. And whether there is such a block.
fn with_filters(source: &str) -> (String, bool) {
    let (mut out, mut rest, mut found) = (String::with_capacity(source.len()), source, false);
    while let Some(at) = ["{%", "{#"].into_iter().filter_map(|open| rest.find(open)).min() {
        let (before, tag) = rest.split_at(at);
        out.push_str(before);
        if tag.starts_with("{#") {
            let (comment, after) = tag.split_at(tag.find("#}").map_or(tag.len(), |end| end + 2));
            out.push_str(comment);
            rest = after;
            continue;
        }
        let inside = &tag[2..tag.find("%}").unwrap_or(tag.len()).max(2)];
        let is_sign = |c: char| c == '-' || c == '+';
        let word = inside.trim_start_matches(is_sign).trim_end_matches(is_sign).trim();
        let words = match word {
            "generation" => format!("filter {GENERATION} %}}{{% with"),
            "endgeneration" => "endwith %}{% endfilter".to_owned(),
            other => other.to_owned(),
        };
        found |= word == "generation";
        let at = inside.find(word).expect("a part of it");
        out.extend(["{%", &inside[..at], &words, &inside[at + word.len()..]]);
        rest = &tag[2 + inside.len()..];
    }
    out.push_str(rest);
    (out, found)
}

/// The variables of a template.
pub(super) fn variables(
    special: &serde_json::Map<String, serde_json::Value>,
    messages: &[serde_json::Map<String, serde_json::Value>],
    add_generation_prompt: bool,
) -> Value {
    context! {
        messages => Value::from(Serde(messages)),
        tools => Value::from(()),
        documents => Value::from(()),
        add_generation_prompt,
        ..Value::from(Serde(special))
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn numbers_and_splits_are_pythons() {
        for (template, text) in [
            ("{{ [0.00001, 1.5e-7, 0.0001, 0.1, 3.0] | tojson }}", "[1e-05, 1.5e-07, 0.0001, 0.1, 3.0]"),
            (
                "{{ [-2.5e-5, 1e16, 123456789.25, 1e15, 0.0] | tojson }}",
                "[-2.5e-05, 1e+16, 123456789.25, 1000000000000000.0, 0.0]",
            ),
            ("{{ 'a-b-c'.split('-', maxsplit=1) | join('|') }}", "a|b-c"),
            ("{{ 'a-b-c'.rsplit('-', maxsplit=1) | join('|') }}", "a-b|c"),
            ("{{ 'a-b-c'.rsplit('-', 1) | join('|') }}", "a-b|c"),
            ("{{ 'a-b-c'.split('-') | join('|') }}", "a|b|c"),
            ("{{ 'a b  c'.split(maxsplit=1) | join('|') }}", "a|b  c"),
        ] {
            let (env, _) = environment(template).unwrap();
            let rendered = env.get_template(NAME).unwrap().render(context! {});
            assert_eq!(rendered.unwrap_or_else(|e| panic!("{template}: {e}")), text, "{template}");
        }
    }

    #[test]
    fn generation_blocks_become_filters() {
        let filtered = "{% filter __generation__ %}{% with %}x{% endwith %}{% endfilter %}";
        let signs = "a{%- filter __generation__ %}{% with -%}\nx{%+endwith %}{% endfilter-%}b";
        let table = [
            ("{% generation %}x{% endgeneration %}", filtered, true),
            ("a{%- generation -%}\nx{%+endgeneration-%}b", signs, true),
            ("{% if generation %}{% set x = 1 %}{% endif %}{{ '{%' }}", "", false),
            ("{# {% generation %} #}{% if x %}{#", "", false),
            ("{%", "", false),
            ("{%%}{%-%}", "", false),
        ];
        for (source, other, found) in table {
            let other = if other.is_empty() { source } else { other };
            assert_eq!(with_filters(source), (other.to_owned(), found), "{source}");
        }
    }
}
