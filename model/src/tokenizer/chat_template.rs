//! A conversation as the text that the model was trained to continue. In: the folder's chat template and messages. Out:
//! the prompt's text, as `transformers` renders it. Never here: access to anything but the messages and the clock;
//! a template is bounded in steps, depth, and what it writes.

use std::collections::BTreeMap;
use std::io;
use std::path::{Path, PathBuf};
use std::sync::Arc;

use minijinja::syntax::SyntaxConfig;
use minijinja::{Environment, Error as JinjaError, ErrorKind, Value};

use super::{named_special_tokens, template_functions};
use crate::config::{Fields, read_object, read_text};

const MAX_TEMPLATE_BYTES: u64 = 1 << 20;
const MAX_RENDERED_BYTES: usize = 4 << 20;
/// Steps of the template engine: DeepSeek-V3's template takes about 60 for one message.
const MAX_STEPS: u64 = 250_000;
/// A template can nest a value one deeper with each step, and the engine walks and frees values recursively: this is
/// 1 kB for each step, of which only what is used is ever memory.
const STACK_BYTES: usize = MAX_STEPS as usize * 1024;
const MAX_DEPTH: usize = 64;
const NAME: &str = "chat_template";

/// One message of a conversation.
#[derive(Debug, Clone, PartialEq, Eq)]
pub struct Message {
    /// "system", "user", "assistant", …: the template knows which there are.
    pub role: String,
    pub content: String,
}

/// Why a conversation could not be rendered.
#[derive(Debug, thiserror::Error)]
#[non_exhaustive]
pub enum TemplateError {
    #[error(transparent)]
    Tokenizer(#[from] super::Error),
    #[error("{}: {reason}", file.display())]
    Unreadable { file: PathBuf, reason: String },
    #[error("chat template failed: {0}")]
    Failed(String),
    #[error("chat template took more than {MAX_STEPS} steps")]
    TooManySteps,
    #[error("chat template wrote more than {MAX_RENDERED_BYTES} bytes")]
    TooLong,
}

/// A compiled chat template. Cheap to clone.
#[derive(Debug, Clone)]
pub struct ChatTemplate {
    environment: Arc<Environment<'static>>,
    /// `bos_token`, `eos_token` and the like, as the template names them.
    special_tokens: BTreeMap<String, String>,
}

impl ChatTemplate {
    /// Reads `dir/chat_template.jinja`, else `chat_template` of `dir/tokenizer_config.json`: a string, or a list of named
    /// ones of which "default" is taken. `None` when there is neither.
    ///
    /// # Errors
    /// A file cannot be read, or the template has a syntax error.
    pub fn load(dir: &Path) -> Result<Option<Self>, TemplateError> {
        let (jinja, config) = (dir.join("chat_template.jinja"), dir.join("tokenizer_config.json"));
        let (file, source) = if jinja.is_file() {
            let source = read_text(&jinja, MAX_TEMPLATE_BYTES).map_err(super::Error::from)?;
            (jinja, Some(source))
        } else if config.is_file() {
            let source = source_in_config(&config).map_err(super::Error::from)?;
            (config, source)
        } else {
            return Ok(None);
        };
        let Some(source) = source else { return Ok(None) };
        let tokens = named_special_tokens(dir)?;
        let special_tokens = tokens.into_iter().map(|(key, token)| (key, token.content)).collect();
        let template = Self::compile(source, special_tokens);
        template.map(Some).map_err(|error| TemplateError::Unreadable { file, reason: describe(&error) })
    }

    fn compile(source: String, special_tokens: BTreeMap<String, String>) -> Result<Self, JinjaError> {
        let mut environment = Environment::new();
        environment.set_syntax(SyntaxConfig::builder().trim_blocks(true).lstrip_blocks(true).build()?);
        // The name ends in no suffix that would turn on escaping; this makes it certain.
        environment.set_auto_escape_callback(|_| minijinja::AutoEscape::None);
        environment.set_recursion_limit(MAX_DEPTH);
        environment.set_fuel(Some(MAX_STEPS));
        environment.set_unknown_method_callback(minijinja_contrib::pycompat::unknown_method_callback);
        // Both write a nested value with indentation, which is quadratic and costs no fuel.
        environment.remove_filter("pprint");
        environment.remove_global("debug");
        environment.add_filter("tojson", template_functions::tojson);
        environment.add_function("raise_exception", template_functions::raise_exception);
        environment.add_function("strftime_now", template_functions::strftime_now);
        environment.add_template_owned(NAME, source)?;
        Ok(Self { environment: Arc::new(environment), special_tokens })
    }

    /// The prompt of a conversation; with `add_generation_prompt` it ends where the assistant's answer begins. Special
    /// tokens are written out in it: encode it without adding any.
    ///
    /// # Errors
    /// The template refuses the conversation, fails, or goes beyond its bounds.
    pub fn render(&self, messages: &[Message], add_generation_prompt: bool) -> Result<String, TemplateError> {
        let failed = |reason: &str| TemplateError::Failed(reason.to_owned());
        std::thread::scope(|scope| {
            let thread = std::thread::Builder::new().name("chat-template".to_owned()).stack_size(STACK_BYTES);
            let rendering = thread.spawn_scoped(scope, || self.render_here(messages, add_generation_prompt));
            let rendering = rendering.map_err(|error| failed(&error.to_string()))?;
            rendering.join().unwrap_or_else(|_| Err(failed("the template engine panicked")))
        })
    }

    fn render_here(&self, messages: &[Message], add_generation_prompt: bool) -> Result<String, TemplateError> {
        let messages = messages.iter().map(|message| {
            minijinja::context! { role => message.role.as_str(), content => message.content.as_str() }
        });
        let mut variables = BTreeMap::from([
            ("messages", messages.collect::<Value>()),
            ("tools", Value::from(())),
            ("documents", Value::from(())),
            ("add_generation_prompt", Value::from(add_generation_prompt)),
        ]);
        variables.extend(self.special_tokens.iter().map(|(key, token)| (key.as_str(), Value::from(token))));
        let template = self.environment.get_template(NAME).map_err(|error| TemplateError::Failed(describe(&error)))?;
        let mut written = Bounded(Vec::new());
        match template.render_captured_to(Value::from(variables), &mut written) {
            Ok(_) => String::from_utf8(written.0).map_err(|error| TemplateError::Failed(error.to_string())),
            Err(error) => Err(match error.kind() {
                ErrorKind::OutOfFuel => TemplateError::TooManySteps,
                ErrorKind::WriteFailure => TemplateError::TooLong,
                _ => TemplateError::Failed(describe(&error)),
            }),
        }
    }
}

fn source_in_config(file: &Path) -> Result<Option<String>, crate::config::Error> {
    let object = read_object(file)?;
    let fields = Fields::new(file, &object);
    let Some(value) = fields.value("chat_template") else { return Ok(None) };
    let Some(named) = value.as_array() else {
        return Ok(fields.string("chat_template")?.map(str::to_owned));
    };
    let default = named.iter().find(|entry| entry["name"] == "default").unwrap_or(&serde_json::Value::Null);
    match default["template"].as_str() {
        Some(source) => Ok(Some(source.to_owned())),
        None => Err(fields.missing("chat_template.default")),
    }
}

/// An engine's error with what caused it, on one line and no longer than a message should be.
fn describe(error: &JinjaError) -> String {
    let reason = match (error.detail(), error.line()) {
        (Some(detail), Some(line)) => format!("{detail} (line {line})"),
        (Some(detail), None) => detail.to_owned(),
        (None, _) => error.to_string(),
    };
    reason.chars().map(|letter| if letter.is_control() { ' ' } else { letter }).take(500).collect()
}

/// Refuses to take more than it may.
struct Bounded(Vec<u8>);

impl io::Write for Bounded {
    fn write(&mut self, bytes: &[u8]) -> io::Result<usize> {
        if self.0.len() + bytes.len() > MAX_RENDERED_BYTES {
            return Err(io::Error::other("the rendered text is too long"));
        }
        self.0.extend_from_slice(bytes);
        Ok(bytes.len())
    }

    fn flush(&mut self) -> io::Result<()> {
        Ok(())
    }
}
