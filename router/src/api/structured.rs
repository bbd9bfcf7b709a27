//! What an answer's text must look like, from a client's message to the state that an answer begins with.
//!
//! In: a `StructuredOutput`. Out: a constraint, with the resumed tokens taken. Never here: how grammars are compiled, or
//! kept.

use conclave_model::grammar::{Constraint, Error, GrammarSpec};
use conclave_proto::{
    inference::v1::{self as pb, structured_output::Grammar as Given},
    status::Failure,
};

use super::{ServedModel, grammars::Grammars};

/// The constraint of an answer that goes on after `resumed`; none where nothing is `given`. May compile.
///
/// # Errors
/// `FailedPrecondition` without a tokenizer that grammars can use, else `InvalidArgument` with the field's path.
pub(super) fn constraint(
    given: Option<pb::StructuredOutput>,
    model: &ServedModel,
    grammars: &Grammars,
    resumed: &[u32],
) -> Result<Option<Constraint>, Failure> {
    let Some(given) = given else { return Ok(None) };
    let (field, spec) = spec(given)?;
    spec.check().map_err(|error| failure(field, &error))?;
    let Some(tokenizer) = &model.tokenizer else {
        let message = "this model has no tokenizer, so that no text can be held to a grammar";
        return Err(Failure::precondition("NO_TOKENIZER", message));
    };
    let grammar = grammars.get(tokenizer, model.config.vocab_size, spec).map_err(|error| failure(field, &error))?;
    let mut constraint = grammar.constraint().map_err(|error| failure(field, &error))?;
    constraint.resume(resumed).map_err(|error| failure(field, &error))?;
    Ok(Some(constraint))
}

/// The grammar with the path of the field that it came in.
fn spec(given: pb::StructuredOutput) -> Result<(&'static str, GrammarSpec), Failure> {
    match given.grammar {
        Some(Given::JsonSchema(text)) => Ok(("structured.json_schema", GrammarSpec::JsonSchema(text))),
        Some(Given::Regex(pattern)) => Ok(("structured.regex", GrammarSpec::Regex(pattern))),
        Some(Given::Choice(choice)) => Ok(("structured.choice.options", GrammarSpec::Choice(choice.options))),
        None => Err(Failure::invalid("structured", "one of json_schema, regex and choice must be set")),
    }
}

/// What a grammar's error means for the one who sent it in `field`.
pub(super) fn failure(field: &str, error: &Error) -> Failure {
    let message = error.to_string();
    match error {
        Error::Choice { at, .. } => Failure::invalid(format!("{field}[{at}]"), message),
        Error::Unfit { at } => Failure::invalid(format!("resume_tokens[{at}]"), message),
        Error::Vocabulary(_) => Failure::precondition("NO_GRAMMARS", message),
        Error::Failed(_) => Failure::internal(message),
        _ => Failure::invalid(field, message),
    }
}

#[cfg(test)]
mod tests {
    use conclave_proto::status::ErrorKind;

    use super::{super::test_model::served, *};

    fn of(given: Given) -> Option<pb::StructuredOutput> {
        Some(pb::StructuredOutput { grammar: Some(given) })
    }

    fn regex(pattern: &str) -> Option<pb::StructuredOutput> {
        of(Given::Regex(pattern.to_owned()))
    }

    fn choice(options: &[String]) -> Option<pb::StructuredOutput> {
        of(Given::Choice(pb::Choice { options: options.to_vec() }))
    }

    fn field_at_fault(given: Option<pb::StructuredOutput>, resumed: &[u32]) -> String {
        let failure = constraint(given, &served(), &Grammars::default(), resumed).unwrap_err();
        assert_eq!(failure.kind, ErrorKind::InvalidArgument, "{failure}");
        failure.field.unwrap()
    }

    #[test]
    fn the_field_at_fault_is_named() {
        let schema = |text: &str| of(Given::JsonSchema(text.to_owned()));
        assert_eq!(field_at_fault(Some(pb::StructuredOutput::default()), &[]), "structured");
        assert_eq!(field_at_fault(schema("{"), &[]), "structured.json_schema");
        assert_eq!(field_at_fault(schema(&" ".repeat((64 << 10) + 1)), &[]), "structured.json_schema");
        assert_eq!(field_at_fault(regex("a("), &[]), "structured.regex");
        assert_eq!(field_at_fault(regex(&"a".repeat((16 << 10) + 1)), &[]), "structured.regex");
        assert_eq!(field_at_fault(choice(&[]), &[]), "structured.choice.options");
        assert_eq!(field_at_fault(choice(&vec!["a".to_owned(); 257]), &[]), "structured.choice.options");
        let options = ["a", "b", "c", ""].map(str::to_owned);
        assert_eq!(field_at_fault(choice(&options), &[]), "structured.choice.options[3]");
        assert_eq!(field_at_fault(choice(&["x".repeat(1_025)]), &[]), "structured.choice.options[0]");
        assert_eq!(field_at_fault(regex("ab"), &[b'a'.into(), b'c'.into()]), "resume_tokens[1]");
    }

    #[test]
    fn an_answer_goes_on_after_its_resumed_tokens() {
        let (model, grammars) = (served(), Grammars::default());
        assert!(constraint(None, &model, &grammars, &[7]).unwrap().is_none());
        let mut going_on = constraint(regex("ab?"), &model, &grammars, &[b'a'.into()]).unwrap().unwrap();
        let allowed: Vec<u32> = going_on.allowed(&[257]).unwrap().iter().collect();
        assert_eq!(allowed, [u32::from(b'b'), 257]);
    }

    #[test]
    fn a_model_without_a_tokenizer_has_no_grammars() {
        let model = ServedModel { tokenizer: None, ..served() };
        let failure = constraint(regex("a"), &model, &Grammars::default(), &[]).unwrap_err();
        assert_eq!((failure.kind, failure.reason), (ErrorKind::FailedPrecondition, "NO_TOKENIZER"));
    }
}
