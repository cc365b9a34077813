//! `harness schema`: the JSON schema of a document.

use crate::cli::print_json;
use crate::error::CommandError;
use crate::exit::Blame;
use crate::schema::Document;

/// `harness schema`
#[derive(Debug, clap::Args)]
#[command(after_help = "Examples:
    harness schema scenario > scenario.schema.json
    harness schema verdict | jq .properties

An editor with a YAML language server takes the schema of a file from its first line:
    # yaml-language-server: $schema=./scenario.schema.json")]
pub(super) struct Args {
    /// The document
    #[arg(value_name = "scenario|profile|recipe|plan|events|verdict")]
    document: Document,
}

pub(super) fn run(args: Args) -> Result<u8, CommandError> {
    let text = args
        .document
        .schema_text()
        .map_err(|error| CommandError::new(Blame::Harness, "encoding the schema", &error))?;
    print_json(&text);
    Ok(0)
}
