//! A JSON Schema, checked before it is compiled.
//!
//! In: a schema's text. Out: the schema, with everything in it bounded. Never here: another document than the one given;
//! a schema that the compiler would multiply into something far larger.

use std::collections::HashMap;

use llguidance::JsonCompileOptions;
use serde_json::{Map, Value};

use super::{Error, check_groups};

/// Objects and arrays in each other. Nobody writes that many by hand.
const DEPTH_MAX: usize = 64;
/// Parts of the schema once all alternatives that are combined with others are written out.
const WEIGHT_MAX: u64 = 100_000;
/// `patternProperties` in the whole schema: each is compared with each.
const PATTERN_PROPERTIES_MAX: usize = 64;
/// `oneOf` options are compared with each other too.
const ONE_OF_MAX: usize = 256;
/// Between two parts of an answer; without an end a model may write blanks until its last token.
const BLANKS: &str = r"[\x20\x0A\x0D\x09]{1,64}";

/// Keywords whose value is a schema, or several, for a part of what their own schema describes.
const PARTS: [&str; 15] = [
    "additionalProperties",
    "additionalItems",
    "items",
    "prefixItems",
    "contains",
    "not",
    "if",
    "then",
    "else",
    "propertyNames",
    "unevaluatedItems",
    "unevaluatedProperties",
    "properties",
    "patternProperties",
    "dependentSchemas",
];
/// Of these, those whose schemas have names of the client's choice.
const NAMED_PARTS: [&str; 3] = ["properties", "patternProperties", "dependentSchemas"];
/// What a value without a `type` may be.
const TYPES: u64 = 6;

/// The schema of `text` as the compiler takes it, with the rule for blanks put in.
///
/// # Errors
/// It is no JSON, refers to another document, or would become too large.
pub(super) fn checked(text: &str) -> Result<Value, Error> {
    // serde_json itself goes no deeper than 128.
    let mut schema: Value =
        serde_json::from_str(text).map_err(|error| Error::Invalid(format!("is no JSON: {error}")))?;
    if depth(&schema) > DEPTH_MAX {
        return Err(Error::TooLarge(format!("is nested more than {DEPTH_MAX} deep")));
    }
    match &mut schema {
        Value::Bool(_) => return Ok(schema),
        Value::Object(object) => {
            // The compiler's own extension, which is none of JSON Schema's.
            object.remove("x-guidance");
        }
        _ => return Err(Error::Invalid("is no JSON Schema: it must be an object".to_owned())),
    }
    let mut scale = Scale { root: &schema, referred: HashMap::new(), total: 0, patterns: 0 };
    let weight = scale.weigh(&schema, false)?;
    scale.count(weight)?;
    let options = JsonCompileOptions { whitespace_pattern: Some(BLANKS.to_owned()), ..Default::default() };
    options.apply_to(&mut schema);
    Ok(schema)
}

fn depth(value: &Value) -> usize {
    match value {
        Value::Array(items) => 1 + items.iter().map(depth).max().unwrap_or(0),
        Value::Object(object) => 1 + object.values().map(depth).max().unwrap_or(0),
        _ => 0,
    }
}

/// An upper bound for what the compiler makes of a schema.
///
/// Where two schemas hold at once, it writes out every combination of their alternatives, and copies into each what has
/// none.
#[derive(Clone, Copy, Debug, PartialEq)]
struct Weight {
    /// Its parts.
    parts: u64,
    /// How many ways there are through its alternatives, down to one part.
    ways: u64,
}

const LEAF: Weight = Weight { parts: 1, ways: 1 };

impl Weight {
    /// Both at once.
    fn and(self, other: Self) -> Self {
        let parts = self.parts.saturating_mul(other.ways);
        Self {
            parts: parts.saturating_add(other.parts.saturating_mul(self.ways)),
            ways: self.ways.saturating_mul(other.ways),
        }
    }

    /// Either.
    fn or(self, other: Self) -> Self {
        Self { parts: self.parts.saturating_add(other.parts), ways: self.ways.saturating_add(other.ways) }
    }

    /// Each in its place.
    fn beside(self, other: Self) -> Self {
        Self { parts: self.parts.saturating_add(other.parts), ways: self.ways.max(other.ways) }
    }
}

struct Scale<'a> {
    root: &'a Value,
    /// What references refer to, and whether it is to be written out there; `None` while it is being weighed.
    referred: HashMap<(&'a str, bool), Option<Weight>>,
    total: u64,
    patterns: usize,
}

impl<'a> Scale<'a> {
    fn count(&mut self, weight: Weight) -> Result<(), Error> {
        self.total = self.total.saturating_add(weight.parts);
        if self.total > WEIGHT_MAX {
            let message = "is too large: its alternatives, combined, are too many";
            return Err(Error::TooLarge(message.to_owned()));
        }
        Ok(())
    }

    /// With `written_out`, a reference weighs what it refers to.
    fn weigh(&mut self, schema: &'a Value, written_out: bool) -> Result<Weight, Error> {
        let Some(object) = schema.as_object() else { return Ok(LEAF) };
        if !std::ptr::eq(schema, self.root) && ["$id", "id"].iter().any(|key| object.get(*key).is_some_and(is_text)) {
            return Err(Error::Invalid("holds a document of its own ($id), which is not supported".to_owned()));
        }
        let combined = ["allOf", "anyOf", "oneOf", "enum", "const", "$ref"];
        let mut members = combined.iter().filter(|key| object.contains_key(**key)).count();
        members += usize::from(PARTS.iter().any(|key| object.contains_key(*key)));
        let several = object.get("allOf").and_then(Value::as_array).is_some_and(|all| all.len() > 1);
        let written_out = written_out || members > 1 || several;

        let mut weight = self.weigh_parts(object, written_out)?;
        for option in list(object, "allOf") {
            weight = weight.and(self.weigh(option, written_out)?);
        }
        for key in ["anyOf", "oneOf"] {
            if key == "oneOf" && list(object, key).len() > ONE_OF_MAX {
                return Err(Error::TooLarge(format!("has a oneOf with more than {ONE_OF_MAX} options")));
            }
            weight = weight.and(self.weigh_options(list(object, key), written_out)?);
        }
        if object.contains_key("enum") {
            let values = list(object, "enum").iter().map(|value| Weight { parts: size(value), ways: 1 });
            weight = weight.and(values.reduce(Weight::or).unwrap_or(LEAF));
        }
        if let Some(value) = object.get("const") {
            weight = weight.and(Weight { parts: size(value), ways: 1 });
        }
        if let Some(reference) = object.get("$ref").and_then(Value::as_str) {
            weight = weight.and(self.weigh_reference(reference, written_out)?);
        }
        Ok(weight)
    }

    fn weigh_options(&mut self, options: &'a [Value], written_out: bool) -> Result<Weight, Error> {
        let mut sum: Option<Weight> = None;
        for option in options {
            let weight = self.weigh(option, written_out)?;
            sum = Some(sum.map_or(weight, |sum| sum.or(weight)));
        }
        Ok(sum.unwrap_or(LEAF))
    }

    /// What a schema says of the value itself and of the values in it.
    fn weigh_parts(&mut self, object: &'a Map<String, Value>, written_out: bool) -> Result<Weight, Error> {
        for key in ["$dynamicRef", "$recursiveRef"] {
            if object.contains_key(key) {
                return Err(Error::Invalid(format!("has a {key}, which is not supported")));
            }
        }
        if let Some(pattern) = object.get("pattern").and_then(Value::as_str) {
            check_groups(pattern)?;
        }
        if let Some(patterns) = object.get("patternProperties").and_then(Value::as_object) {
            patterns.keys().try_for_each(|pattern| check_groups(pattern))?;
            self.patterns += patterns.len();
            if self.patterns > PATTERN_PROPERTIES_MAX {
                return Err(Error::TooLarge(format!("has more than {PATTERN_PROPERTIES_MAX} patternProperties")));
            }
        }
        let mut inner = LEAF;
        for (key, value) in object {
            if !PARTS.contains(&key.as_str()) {
                continue;
            }
            match value {
                Value::Object(named) if NAMED_PARTS.contains(&key.as_str()) => {
                    for part in named.values() {
                        inner = inner.beside(self.weigh(part, written_out)?);
                    }
                }
                Value::Array(parts) => {
                    for part in parts {
                        inner = inner.beside(self.weigh(part, written_out)?);
                    }
                }
                part => inner = inner.beside(self.weigh(part, written_out)?),
            }
        }
        let types = match object.get("type") {
            Some(Value::Array(types)) => types.len() as u64,
            Some(_) => 1,
            None => TYPES,
        };
        let has_parts = inner != LEAF || object.contains_key("type");
        let others = if has_parts { types.saturating_sub(1) } else { 0 };
        Ok(inner.or(Weight { parts: others, ways: others }))
    }

    fn weigh_reference(&mut self, reference: &'a str, written_out: bool) -> Result<Weight, Error> {
        let Some(pointer) = reference.strip_prefix('#').filter(|rest| rest.is_empty() || rest.starts_with('/')) else {
            return Err(Error::Invalid(
                "refers to another document, or by an anchor: only #/… is supported".to_owned(),
            ));
        };
        let of = |weight: Weight| if written_out { weight } else { LEAF };
        match self.referred.get(&(pointer, written_out)) {
            Some(Some(weight)) => return Ok(of(*weight)),
            // It is a part of itself: the compiler goes around once.
            Some(None) => return Ok(LEAF),
            None => {}
        }
        let Some(target) = resolve(self.root, pointer) else {
            return Err(Error::Invalid("refers to a place in itself that is not there".to_owned()));
        };
        self.referred.insert((pointer, written_out), None);
        let weight = self.weigh(target, written_out)?;
        self.referred.insert((pointer, written_out), Some(weight));
        self.count(weight)?;
        Ok(of(weight))
    }
}

fn is_text(value: &Value) -> bool {
    value.is_string()
}

fn list<'a>(object: &'a Map<String, Value>, key: &str) -> &'a [Value] {
    object.get(key).and_then(Value::as_array).map_or(&[], Vec::as_slice)
}

/// Values in a value.
fn size(value: &Value) -> u64 {
    match value {
        Value::Array(items) => 1 + items.iter().map(size).sum::<u64>(),
        Value::Object(object) => 1 + object.values().map(size).sum::<u64>(),
        _ => 1,
    }
}

/// A JSON pointer (RFC 6901) as it stands in a reference, where `%24` is a dollar.
fn resolve<'a>(root: &'a Value, pointer: &str) -> Option<&'a Value> {
    let mut bytes = Vec::with_capacity(pointer.len());
    let mut rest = pointer.as_bytes();
    while let Some((&byte, after)) = rest.split_first() {
        let digits = (byte == b'%').then(|| after.get(..2)).flatten();
        let escaped = digits.and_then(|digits| u8::from_str_radix(std::str::from_utf8(digits).ok()?, 16).ok());
        bytes.push(escaped.unwrap_or(byte));
        rest = if escaped.is_some() { &after[2..] } else { after };
    }
    root.pointer(std::str::from_utf8(&bytes).ok()?)
}
