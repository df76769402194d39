//! Paths: what parses prints canonically, order is structural, patterns become sites.

#![expect(clippy::unwrap_used, reason = "a test fails by panicking, its helpers too")]

use lamina_core::path::{ModuleTree, Path};

mod lookup;
mod parts;
mod properties;

fn path(text: &str) -> Path {
    text.parse().unwrap()
}

fn texts(paths: &[Path]) -> Vec<String> {
    paths.iter().map(ToString::to_string).collect()
}

/// The modules of a small Llama: the root's child is called `model`.
fn llama() -> ModuleTree {
    let inner = (0..12).flat_map(|layer| {
        ["", ".self_attn", ".self_attn.q_proj", ".mlp"]
            .map(|module| format!("model.layers.{layer}{module}"))
    });
    let outer = ["", "model", "model.embed_tokens", "model.layers", "model.norm", "lm_head"];
    ModuleTree::new(outer.map(String::from).into_iter().chain(inner))
}
