//! `harness image`: build, list, verify, gc.

use std::fmt::Write as _;
use std::io::Write as _;
use std::time::Duration;

use images::BuildEvent;
use images::airgap::AirgapImages;
use images::downloads;
use images::recipe::Recipes;
use images::store::Store;
use kvm::Supervisor;

use crate::cli::k3s::{K3sArgs, Wanted};
use crate::cli::{Global, base, k3s, print, print_json, runtime, usage};
use crate::error::CommandError;
use crate::exit::Blame;
use crate::formation::image::words;
use crate::lab::OwnedTools;
use crate::record::Folders;

/// `harness image`
#[derive(Debug, clap::Args)]
#[command(after_help = "Example:\n    harness image build debian-k3s --k3s file:./k3s")]
pub(super) struct Args {
    #[command(subcommand)]
    command: ImageCommand,
}

#[derive(Debug, clap::Subcommand)]
enum ImageCommand {
    /// Build a recipe's image, unless the store has it
    #[command(after_help = "Example:\n    harness image build debian-k3s --k3s file:./k3s")]
    Build {
        /// The recipe's name
        #[arg(default_value = "debian-k3s")]
        recipe: String,
        /// The k3s to put into it: file:/path/to/k3s, release:VERSION or standin
        #[arg(long, value_name = "SOURCE")]
        k3s: images::k3s::K3sSource,
        #[command(flatten)]
        k3s_args: K3sArgs,
        /// Print JSON
        #[arg(long)]
        json: bool,
    },
    /// List the images in the store, and the files of k3s releases that were downloaded
    #[command(after_help = "Example:\n    harness image list")]
    List {
        /// Print JSON
        #[arg(long)]
        json: bool,
    },
    /// Read every byte of every image and compare it with what was registered
    #[command(after_help = "Example:\n    harness image verify")]
    Verify,
    /// Remove leftovers of ended builds, and images and downloads that were not used for a while
    #[command(after_help = "Example:\n    harness image gc --unused-days 0")]
    Gc {
        /// Keep what was used within this many days
        #[arg(long, default_value_t = 14)]
        unused_days: u32,
    },
}

pub(super) fn run(global: &Global, args: Args) -> Result<u8, CommandError> {
    let folders = global.folders()?;
    let store =
        Store::open(&folders.cache.join("images")).map_err(|error| store_error("opening the image store", &error))?;
    match args.command {
        ImageCommand::Build { recipe, k3s, k3s_args, json } => {
            let options = k3s_args.options();
            let airgap_images = k3s_args.airgap_images(&k3s, &AirgapImages::None)?;
            let wanted = Wanted { source: &k3s, airgap_images: &airgap_images, options: &options };
            build(&folders, &store, &recipe, &wanted, json)
        }
        ImageCommand::List { json } => list(&folders, &store, json),
        ImageCommand::Verify => verify(&store),
        ImageCommand::Gc { unused_days } => gc(&folders, &store, unused_days),
    }
}

fn store_error(context: &str, error: &images::Error) -> CommandError {
    CommandError::new(Blame::Environment, context, error)
}

fn build(folders: &Folders, store: &Store, recipe: &str, wanted: &Wanted<'_>, json: bool) -> Result<u8, CommandError> {
    let recipe = Recipes::new(Some(base().join("images/recipes")))
        .load(recipe)
        .map_err(|error| usage("reading the recipe", &error))?;
    let k3s::Resolved { binary: k3s, mut signals, runtime } = k3s::resolve(wanted, &folders.cache)?;
    let image = runtime.block_on(async {
        let supervisor = Supervisor::new().map_err(|error| CommandError::new(Blame::Environment, "preparing to start processes", &error))?;
        let tools = OwnedTools::new(supervisor.clone());
        let began = std::time::Instant::now();
        // Standard error may be closed: the image is built all the same.
        let said = |event: BuildEvent| {
            let _ = writeln!(std::io::stderr(), "[{:6.1} s] {}", began.elapsed().as_secs_f64(), words(&event));
        };
        let binaries = [k3s.guest_binary()];
        let built = tokio::select! {
            built = store.ensure(&recipe, &binaries, &tools, &said) => built.map_err(|error| store_error("building the image", &error)),
            signal = signals.next() => {
                Err(CommandError::plain(Blame::Interrupted, format!("interrupted by {signal}")))
            }
        };
        let survivors = supervisor.shutdown(Duration::from_secs(3)).await;
        match survivors.first() {
            Some(survivor) => Err(CommandError::plain(Blame::Harness, survivor.to_string())),
            None => built,
        }
    })?;
    if json {
        let text = serde_json::to_string_pretty(&image)
            .map_err(|error| CommandError::new(Blame::Harness, "encoding the image", &error))?;
        print_json(&format!("{text}\n"));
    } else {
        print(&format!("{} {}\n  k3s: {}\n  root: {}\n", image.name, image.id, image.k3s, image.root));
    }
    Ok(0)
}

fn list(folders: &Folders, store: &Store, json: bool) -> Result<u8, CommandError> {
    let images = store.list().map_err(|error| store_error("listing images", &error))?;
    let downloads = downloads::list(&folders.cache).map_err(|error| store_error("listing downloads", &error))?;
    if json {
        let text = serde_json::to_string_pretty(&serde_json::json!({ "images": images, "downloads": downloads }))
            .map_err(|error| CommandError::new(Blame::Harness, "encoding the list", &error))?;
        print_json(&format!("{text}\n"));
        return Ok(0);
    }
    let mut out = String::new();
    for info in &images {
        let fault = info.fault.as_ref().map_or_else(String::new, |fault| format!("  UNUSABLE: {fault}"));
        let id = info.id.get(..12).unwrap_or(&info.id);
        let _ = writeln!(
            out,
            "{id}  {}  {} MiB on disk  used {}  {}{fault}",
            info.name,
            info.disk_bytes / (1024 * 1024),
            info.last_used,
            info.k3s
        );
    }
    if images.is_empty() {
        out.push_str("no images; `harness image build` makes one, and so does a run\n");
    }
    for found in &downloads {
        let _ = writeln!(
            out,
            "{} {}  {}  {} MiB on disk  used {}  from {}",
            found.version,
            found.arch,
            found.file,
            found.disk_bytes / (1024 * 1024),
            found.last_used,
            found.url
        );
    }
    print(&out);
    Ok(0)
}

fn verify(store: &Store) -> Result<u8, CommandError> {
    let results = runtime()?.block_on(store.verify()).map_err(|error| store_error("verifying images", &error))?;
    let mut out = String::new();
    let mut bad = 0;
    for result in &results {
        let id = result.id.get(..12).unwrap_or(&result.id);
        if result.faults.is_empty() {
            let _ = writeln!(out, "{id}  {}  whole", result.name);
        } else {
            bad += 1;
            let _ = writeln!(out, "{id}  {}  {}", result.name, result.faults.join("; "));
        }
    }
    let _ = writeln!(out, "{} images, {bad} damaged", results.len());
    print(&out);
    if bad == 0 {
        return Ok(0);
    }
    Err(CommandError::plain(Blame::Environment, format!("{bad} images differ from what was registered"))
        .hint("`harness image gc --unused-days 0` removes them; the next run builds anew"))
}

fn gc(folders: &Folders, store: &Store, unused_days: u32) -> Result<u8, CommandError> {
    let unused_for = Duration::from_secs(u64::from(unused_days) * 24 * 3600);
    let collected = async { Ok(store.gc(unused_for).await?.and(downloads::gc(&folders.cache, unused_for).await?)) };
    let report = runtime()?
        .block_on(collected)
        .map_err(|error: images::Error| store_error("collecting images and downloads", &error))?;
    let mut out = String::new();
    for removed in &report.removed {
        let _ = writeln!(out, "removed {removed}");
    }
    for used in &report.in_use {
        let _ = writeln!(out, "kept {used}: in use");
    }
    let _ = writeln!(out, "{} MiB freed", report.freed_bytes / (1024 * 1024));
    print(&out);
    Ok(0)
}
