//! `conclave chat`: lines of a user come in, the model's answers leave as they are drawn, and the history grows. With
//! a pipe on stdin nothing but answers is printed. Nothing is kept after the end.

use std::io::{self, BufRead, IsTerminal, Read};
use std::process::ExitCode;

use anyhow::{Context, bail};
use conclave_proto::inference::v1 as pb;
use conclave_proto::inference::v1::inference_client::InferenceClient;
use pb::generate_request::Input;
use pb::generate_response::Event;
use tokio::signal::unix::{Signal, SignalKind, signal};
use tokio::sync::mpsc;
use tonic::Status;
use tonic::transport::Channel;

use crate::terminal::{self, Output};
use crate::{client, generate};

const MAX_LINE_BYTES: u64 = 1 << 20;

const HELP: &str = "/reset forgets the conversation, /help shows this.
Ctrl-C stops an answer, Ctrl-D leaves.";

/// Talk to the model.
#[derive(Debug, clap::Args)]
#[command(after_help = "Examples:
  conclave chat
  conclave chat --endpoint 127.0.0.1:7400 --temperature 0
  printf 'Name a river.\\nAnd where is it?\\n' | conclave chat")]
pub(crate) struct Args {
    #[command(flatten)]
    options: client::Options,
}

/// How an answer came to its end.
enum Ending {
    Finished,
    Interrupted,
    Failed(Status),
}

pub(crate) async fn run(args: Args) -> anyhow::Result<ExitCode> {
    let mut client = client::connect(&args.options.endpoint).await?;
    let model = match client.get_model(pb::GetModelRequest {}).await {
        Ok(response) => response.into_inner(),
        Err(status) => bail!("{}", client::sentence(&status)),
    };
    if !model.has_chat_template {
        bail!("{} has no chat template: it continues texts, see `conclave generate --help`", model.name);
    }
    let interactive = io::stdin().is_terminal() && io::stdout().is_terminal();
    let mut output = Output::stdout();
    if interactive {
        output.line(&format!("{}, {} tokens of context. {HELP}", model.name, model.context_tokens))?;
    }
    let interrupts = if interactive { Some(signal(SignalKind::interrupt())?) } else { None };
    Session { client, args, output, interrupts, history: Vec::new() }.talk().await
}

struct Session {
    client: InferenceClient<Channel>,
    args: Args,
    output: Output,
    /// Only with a person at the terminal; otherwise SIGINT keeps its usual meaning.
    interrupts: Option<Signal>,
    history: Vec<pb::ChatMessage>,
}

impl Session {
    async fn talk(&mut self) -> anyhow::Result<ExitCode> {
        let interactive = self.interrupts.is_some();
        let mut lines = lines_of_stdin()?;
        loop {
            if interactive {
                self.output.text("> ")?;
            }
            let line = tokio::select! {
                line = lines.recv() => line,
                () = interrupted(&mut self.interrupts) => {
                    self.output.line("\n(Ctrl-D leaves)")?;
                    continue;
                }
            };
            let Some(line) = line else {
                if interactive {
                    self.output.line("")?;
                }
                return Ok(ExitCode::SUCCESS);
            };
            match line?.trim() {
                "" => {}
                "/help" => self.output.line(HELP)?,
                "/reset" => self.history.clear(),
                text if interactive && text.starts_with('/') && !text.contains(char::is_whitespace) => {
                    self.output.line(&format!("no command {text}. {HELP}"))?;
                }
                text => {
                    if let Ending::Failed(status) = self.exchange(text).await? {
                        terminal::warn(&format!("error: {}", client::sentence(&status)));
                        // A person can rephrase; a script shall notice.
                        if !interactive {
                            return Ok(ExitCode::FAILURE);
                        }
                    }
                }
            }
        }
    }

    /// Asks, streams the answer, and keeps both. What failed or never began leaves the history as it was.
    async fn exchange(&mut self, text: &str) -> anyhow::Result<Ending> {
        self.history.push(message("user", text.to_owned()));
        let mut answer = String::new();
        let ending = self.stream(&mut answer).await?;
        if !answer.is_empty() && !answer.ends_with('\n') {
            self.output.line("")?;
        }
        if answer.is_empty() || matches!(ending, Ending::Failed(_)) {
            self.history.pop();
        } else {
            self.history.push(message("assistant", answer));
        }
        Ok(ending)
    }

    /// Dropping the stream, at whichever return, cancels the request in the router.
    async fn stream(&mut self, answer: &mut String) -> anyhow::Result<Ending> {
        let chat = pb::Chat { messages: self.history.clone(), add_generation_prompt: None };
        let request = self.args.options.request(Input::Chat(chat));
        let response = tokio::select! {
            response = self.client.generate(request) => response,
            () = interrupted(&mut self.interrupts) => return Ok(Ending::Interrupted),
        };
        let mut stream = match response {
            Ok(response) => response.into_inner(),
            Err(status) => return Ok(Ending::Failed(status)),
        };
        loop {
            let next = tokio::select! {
                next = stream.message() => next,
                () = interrupted(&mut self.interrupts) => return Ok(Ending::Interrupted),
            };
            let event = match next {
                Ok(Some(message)) => message.event,
                Ok(None) => return Ok(Ending::Failed(Status::internal("the answer ended without its last event"))),
                Err(status) => return Ok(Ending::Failed(status)),
            };
            let Some(event) = event else { continue };
            let text = generate::text_of(&event);
            self.output.text(&text)?;
            answer.push_str(&text);
            if matches!(event, Event::Finished(_)) {
                return Ok(Ending::Finished);
            }
        }
    }
}

fn message(role: &str, content: String) -> pb::ChatMessage {
    pb::ChatMessage { role: role.to_owned(), content }
}

/// Never, where nobody listens for signals.
async fn interrupted(interrupts: &mut Option<Signal>) {
    match interrupts {
        Some(signal) => {
            signal.recv().await;
        }
        None => std::future::pending().await,
    }
}

/// Stdin, line by line, from a thread of its own: a blocking read cannot be cancelled, and must not hold the exit.
fn lines_of_stdin() -> anyhow::Result<mpsc::Receiver<anyhow::Result<String>>> {
    let (sender, receiver) = mpsc::channel(1);
    let read = move || {
        let mut stdin = io::stdin().lock();
        while let Some(line) = next_line(&mut stdin) {
            let last = line.is_err();
            if sender.blocking_send(line).is_err() || last {
                return;
            }
        }
    };
    std::thread::Builder::new().name("stdin".to_owned()).spawn(read).context("cannot start a thread for stdin")?;
    Ok(receiver)
}

/// `None` at the end; an error for a line that is too long or cannot be read.
fn next_line(input: &mut impl BufRead) -> Option<anyhow::Result<String>> {
    let mut line = Vec::new();
    match input.take(MAX_LINE_BYTES + 1).read_until(b'\n', &mut line) {
        Err(error) => Some(Err(anyhow::Error::new(error).context("cannot read stdin"))),
        Ok(0) => None,
        Ok(length) if length as u64 > MAX_LINE_BYTES => {
            Some(Err(anyhow::anyhow!("a line on stdin is longer than {}", terminal::bytes(MAX_LINE_BYTES))))
        }
        Ok(_) => Some(Ok(String::from_utf8_lossy(&line).into_owned())),
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn lines_end_with_the_input_and_are_bounded() {
        let mut input = io::Cursor::new(b"one\ntw\xffo".to_vec());
        assert_eq!(next_line(&mut input).unwrap().unwrap(), "one\n");
        assert_eq!(next_line(&mut input).unwrap().unwrap(), "tw\u{fffd}o");
        assert!(next_line(&mut input).is_none());
        let mut endless = io::BufReader::new(io::repeat(b'a'));
        assert!(next_line(&mut endless).unwrap().is_err());
    }
}
