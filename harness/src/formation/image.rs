//! image: the base image of all nodes, from the store or built into it.

use images::BuildEvent;
use images::k3s::K3sBinary;
use images::recipe::Recipe;
use images::store::{Image, Store};

use crate::exit::Blame;
use crate::failure::Failure;
use crate::formation::context::{Context, Done};
use crate::lab::OwnedTools;
use crate::plan::Phase;
use crate::record::Folders;
use crate::reporter::human_ms;

/// The store under the cache folder.
///
/// # Errors
/// The environment's failure.
pub fn open_store(folders: &Folders) -> Result<Store, Failure> {
    Store::open(&folders.cache.join("images")).map_err(|error| {
        Failure::from_error(Blame::Environment, "opening the image store", &error)
            .in_phase(Phase::Image)
            .hint("choose another folder with --cache-dir")
    })
}

/// Finds or builds the image.
///
/// # Errors
/// The failure of whoever is to blame for it: the recipe's author, the network, the disk.
pub async fn image(
    cx: &Context,
    store: &Store,
    tools: &OwnedTools,
    recipe: &Recipe,
    k3s: &K3sBinary,
) -> Result<Image, Failure> {
    cx.phase(Phase::Image, None, format!("the image {} with {}", recipe.name, k3s.label), async {
        let sink = cx.sink.clone();
        let said = move |event: BuildEvent| sink.progress(Phase::Image, None, words(&event));
        let image = store.ensure(recipe, &[k3s.guest_binary()], tools, &said).await.map_err(|error| {
            Failure::from_error(blame(&error), format!("preparing the image {}", recipe.name), &error)
        })?;
        let id = image.id.get(..12).unwrap_or(&image.id).to_owned();
        Ok(Done::new(image, format!("{} {id}", recipe.name)))
    })
    .await
}

fn blame(error: &images::Error) -> Blame {
    match error {
        images::Error::Recipe(_) => Blame::Usage,
        _ => Blame::Environment,
    }
}

/// A step of a build in words.
#[must_use]
pub fn words(event: &BuildEvent) -> String {
    let short = |id: &str| id.get(..12).unwrap_or(id).to_owned();
    match event {
        BuildEvent::Hit { id } => format!("image {} is in the store", short(id)),
        BuildEvent::Discarded { id, reason } => {
            format!("image {} cannot be used and is built anew: {reason}", short(id))
        }
        BuildEvent::Waiting => "waiting for another build to end".to_owned(),
        BuildEvent::Step { what } => what.clone(),
        BuildEvent::Built { id, elapsed_ms } => format!("image {} built in {}", short(id), human_ms(*elapsed_ms)),
    }
}
