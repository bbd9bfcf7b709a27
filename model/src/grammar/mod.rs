//! Answers that have a form: what may be drawn next so that the whole text fits a JSON Schema, a regular expression, or
//! one of a few choices.
//!
//! In: a [`Vocabulary`], a [`GrammarSpec`]; then an answer's tokens, one by one. Out: a [`Grammar`], then a [`Mask`] of
//! allowed tokens per position. Never here: a draw; a grammar that has no bounds; a panic of the library that leaves this
//! folder; the network, or any file.
//!
//! The work is llguidance's: it walks the tree of all tokens with a parser and keeps those that the text may go on with.

mod constraint;
mod mask;
mod schema;
mod vocabulary;

use std::{
    panic::{AssertUnwindSafe, catch_unwind},
    sync::Arc,
};

use llguidance::{Matcher, api::TopLevelGrammar};

pub use constraint::Constraint;
pub use mask::Mask;
pub use vocabulary::Vocabulary;

/// Text of a JSON Schema.
pub const SCHEMA_BYTES_MAX: usize = 64 << 10;
/// Text of a regular expression.
pub const REGEX_BYTES_MAX: usize = 16 << 10;
/// Choices of one grammar.
pub const CHOICES_MAX: usize = 256;
/// Of one choice.
pub const CHOICE_BYTES_MAX: usize = 1_024;

/// The compiler follows references and nests by recursion: a schema of 64 KiB can make it go some thousand deep. Only
/// what is used of this is ever memory.
const STACK_BYTES: usize = 256 << 20;
/// Of an error of the library.
const REASON_CHARS_MAX: usize = 300;

/// Why there is no grammar, or why an answer cannot go on with it. Each reads well after the name of a field.
#[derive(Clone, Debug, thiserror::Error, PartialEq, Eq)]
#[non_exhaustive]
pub enum Error {
    /// No grammar, or one that no text fits.
    #[error("{0}")]
    Invalid(String),
    /// This choice is none.
    #[error("{reason}")]
    Choice { at: usize, reason: String },
    /// A bound was reached, while compiling or while an answer was drawn.
    #[error("{0}")]
    TooLarge(String),
    /// The token at this place of an answer does not fit.
    #[error("does not fit the grammar from token {at} on")]
    Unfit { at: usize },
    /// The model's tokenizer cannot be used with grammars.
    #[error("the tokenizer cannot be used with grammars: {0}")]
    Vocabulary(String),
    /// The library failed.
    #[error("the grammar library failed: {0}")]
    Failed(String),
}

/// What an answer must look like, as a client says it.
#[derive(Clone, Debug, PartialEq, Eq, Hash)]
pub enum GrammarSpec {
    /// The text of a JSON Schema.
    JsonSchema(String),
    /// A regular expression that the whole answer matches, in the syntax of the crate `regex`.
    Regex(String),
    /// The answer is one of these.
    Choice(Vec<String>),
}

impl GrammarSpec {
    /// Bytes of its texts.
    pub fn len(&self) -> usize {
        match self {
            Self::JsonSchema(text) | Self::Regex(text) => text.len(),
            Self::Choice(options) => options.iter().map(String::len).sum(),
        }
    }

    /// Whether there is no text in it at all.
    pub fn is_empty(&self) -> bool {
        self.len() == 0
    }

    /// Lengths and counts alone: cheap.
    ///
    /// # Errors
    /// `TooLarge`, `Invalid` or `Choice`.
    pub fn check(&self) -> Result<(), Error> {
        let bounded = |text: &str, max: usize| match text.len() {
            len if len > max => Err(Error::TooLarge(format!("must be at most {max} bytes long, is {len}"))),
            _ => Ok(()),
        };
        match self {
            Self::JsonSchema(text) => bounded(text, SCHEMA_BYTES_MAX),
            Self::Regex(text) => bounded(text, REGEX_BYTES_MAX),
            Self::Choice(options) => {
                if !(1..=CHOICES_MAX).contains(&options.len()) {
                    let message = format!("must have 1 to {CHOICES_MAX} options, has {}", options.len());
                    return Err(Error::Invalid(message));
                }
                match options.iter().position(|option| !(1..=CHOICE_BYTES_MAX).contains(&option.len())) {
                    None => Ok(()),
                    Some(at) => {
                        let len = options[at].len();
                        let reason = format!("must be 1 to {CHOICE_BYTES_MAX} bytes long, is {len}");
                        Err(Error::Choice { at, reason })
                    }
                }
            }
        }
    }

    /// As the library reads it.
    fn parse(&self) -> Result<TopLevelGrammar, Error> {
        match self {
            Self::JsonSchema(text) => Ok(TopLevelGrammar::from_json_schema(schema::checked(text)?)),
            Self::Regex(pattern) => {
                check_groups(pattern)?;
                // A backslash at the end escapes nothing; the library would drop it in silence.
                if pattern.bytes().rev().take_while(|&byte| byte == b'\\').count() % 2 == 1 {
                    return Err(Error::Invalid("ends in a single backslash".to_owned()));
                }
                Ok(of_regex(pattern))
            }
            Self::Choice(options) => {
                Ok(of_regex(&options.iter().map(|option| literal(option)).collect::<Vec<_>>().join("|")))
            }
        }
    }
}

/// The library takes a group called `stop` for something of its own.
fn check_groups(pattern: &str) -> Result<(), Error> {
    match pattern.contains("?P<stop>") || pattern.contains("?<stop>") {
        true => Err(Error::Invalid("has a group called stop, which is reserved".to_owned())),
        false => Ok(()),
    }
}

fn of_regex(pattern: &str) -> TopLevelGrammar {
    match pattern {
        // Between two slashes it would be a comment.
        "" => TopLevelGrammar::from_lark("start: \"\"".to_owned()),
        pattern => TopLevelGrammar::from_regex(pattern),
    }
}

/// A regular expression that matches `text` and nothing else.
fn literal(text: &str) -> String {
    let mut pattern = String::with_capacity(text.len() * 2);
    for letter in text.chars() {
        // A backslash before a sign does not always make it plain: \< is the start of a word.
        if letter.is_alphanumeric() {
            pattern.push(letter);
        } else {
            pattern.push_str(&format!("\\x{{{:x}}}", u32::from(letter)));
        }
    }
    pattern
}

/// A compiled grammar, from which any number of answers begin. Cheap to clone.
#[derive(Clone)]
pub struct Grammar {
    start: Arc<Constraint>,
}

impl std::fmt::Debug for Grammar {
    fn fmt(&self, f: &mut std::fmt::Formatter<'_>) -> std::fmt::Result {
        f.debug_struct("Grammar").finish_non_exhaustive()
    }
}

impl Grammar {
    /// Compiles `spec`: milliseconds, for a large one up to some hundred.
    ///
    /// # Errors
    /// It is no grammar, no text of this vocabulary fits it, or it reaches a bound.
    pub fn compile(vocabulary: &Vocabulary, spec: &GrammarSpec) -> Result<Self, Error> {
        spec.check()?;
        std::thread::scope(|scope| {
            let thread = std::thread::Builder::new().name("grammar".to_owned()).stack_size(STACK_BYTES);
            let compiling = thread.spawn_scoped(scope, || Self::compile_here(vocabulary, spec));
            let compiling = compiling.map_err(|error| Error::Failed(error.to_string()))?;
            compiling.join().unwrap_or_else(|_| Err(Error::Failed("it panicked".to_owned())))
        })
    }

    fn compile_here(vocabulary: &Vocabulary, spec: &GrammarSpec) -> Result<Self, Error> {
        let grammar = spec.parse()?;
        let parser = guarded(|| vocabulary.factory().create_parser(grammar).map_err(|error| error.to_string()));
        let parser = parser.map_err(|reason| reason.of_compiling())?;
        let mut start = Constraint::new(Matcher::new(Ok(parser)), vocabulary)?;
        // What comes first is computed here, where no answer waits for it; and something must.
        if start.fork().allowed(&[])?.is_empty() && !start.may_end()? {
            return Err(Error::Invalid("fits no text that this model could write".to_owned()));
        }
        Ok(Self { start: Arc::new(start) })
    }

    /// A new answer, with nothing in it.
    ///
    /// # Errors
    /// `Failed`: the library panicked.
    pub fn constraint(&self) -> Result<Constraint, Error> {
        self.start.detached()
    }
}

/// What the library says when it fails.
#[derive(Debug)]
struct Reason {
    message: String,
}

impl Reason {
    /// The library names its bounds in many ways, and gives advice that is meant for us.
    fn of_compiling(self) -> Error {
        let told = self.message;
        if ["limit", "fuel", "too big", "too large", "too complex", "exceeded"].iter().any(|word| told.contains(word)) {
            return Error::TooLarge("is too much work to compile".to_owned());
        }
        if told.starts_with("oneOf constraints") {
            let message = "has a oneOf whose options are not certain to exclude each other; anyOf would do";
            return Error::Invalid(message.to_owned());
        }
        Error::Invalid(format!("cannot be compiled: {told}"))
    }
}

/// Runs `job`, in which the library may panic.
fn guarded<T>(job: impl FnOnce() -> Result<T, String>) -> Result<T, Reason> {
    let outcome = catch_unwind(AssertUnwindSafe(job)).unwrap_or_else(|_| Err("it panicked".to_owned()));
    outcome.map_err(|error| Reason { message: reason(&error) })
}

/// One line of what the library says: what it adds (a backtrace, the parser's state, the grammar) is left out.
fn reason(error: &str) -> String {
    let told = error.split("\n<").next().unwrap_or_default();
    // A regular expression's error comes as a drawing, with the sentence at its end.
    let sentence = told.lines().rev().find_map(|line| line.strip_prefix("error: "));
    let sentence = sentence.or_else(|| told.lines().find(|line| !line.trim().is_empty())).unwrap_or("no reason given");
    // Before it comes a place in a text that is ours, behind it the pattern.
    let sentence = sentence.split_once("(in regex): ").map_or(sentence, |(_, sentence)| sentence);
    let sentence = sentence.split(" in regex /").next().unwrap_or_default();
    sentence.chars().map(|letter| if letter.is_control() { ' ' } else { letter }).take(REASON_CHARS_MAX).collect()
}

#[cfg(test)]
mod tests;
