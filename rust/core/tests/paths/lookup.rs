//! Expansion against the modules of a model, lookup among recorded sites.

use std::collections::BTreeMap;

use lamina_core::path::{FindError, ModuleTree, Selector, SiteIndex};

use crate::{llama, path, texts};

fn expand(text: &str) -> Vec<String> {
    texts(&llama().expand(&path(text)).unwrap())
}

fn expand_error(text: &str) -> String {
    llama().expand(&path(text)).unwrap_err().to_string()
}

#[test]
fn three_texts_of_one_site_expand_to_its_root_form() {
    for text in ["model.layers[2].output", "model.layers.2.output", "model.model.layers[2].output"]
    {
        assert_eq!(expand(text), ["model.model.layers[2].output"]);
    }
}

#[test]
fn the_root_form_is_tried_before_the_own_name() {
    let tree = ModuleTree::new(["", "h", "model", "model.h"]);
    let found = |text: &str| texts(&tree.expand(&path(text)).unwrap());
    assert_eq!(found("model.h.output"), ["model.h.output"]);
    assert_eq!(found("model.model.h.output"), ["model.model.h.output"]);
    assert_eq!(found("model.model.output"), ["model.model.output"]);
    assert_eq!(found("model.output"), ["model.output"]);
}

#[test]
fn patterns_expand_in_order_and_once() {
    let layers = |numbers: &[u8]| -> Vec<String> {
        numbers
            .iter()
            .map(|number| format!("model.model.layers[{number}].mlp.output[-1]"))
            .collect()
    };
    assert_eq!(expand("model.layers[-1].mlp.output[-1]"), layers(&[11]));
    assert_eq!(expand("model.layers[::4].mlp.output[-1]"), layers(&[0, 4, 8]));
    assert_eq!(expand("model.layers[7, 0, -5, 7].mlp.output[-1]"), layers(&[0, 7]));
    assert_eq!(expand("model.layers[10:99].mlp.output[-1]"), layers(&[10, 11]));
}

#[test]
fn what_an_index_or_slice_misses_is_told() {
    assert_eq!(
        expand_error("model.layers[12].output"),
        "`model.layers[12].output` names nothing here: \
         `model.model.layers` has 12 entries, [0] to [11], and no [12]"
    );
    assert_eq!(
        expand_error("model.layers[0,40].output"),
        "`model.layers[0,40].output` names nothing here: \
         `model.model.layers` has 12 entries, [0] to [11], and no [40]"
    );
    assert_eq!(
        expand_error("model.layers[20:].output"),
        "`model.layers[20:].output` names nothing here: \
         `[20:]` selects none of the 12 in `model.model.layers`"
    );
}

#[test]
fn the_nearest_real_names_are_listed() {
    let cases = [
        ("model.layer[2].output", "model.model.layers[2].output"),
        ("model.layers[:].mpl.output", "model.model.layers[:].mlp.output"),
        ("model.layers[3].attn.input", "model.model.layers[3].self_attn.input"),
        ("model.h[0].output", "model.model.layers[0].output"),
        ("model.lm_haed.output", "model.lm_head.output"),
        ("model.lm_head[0].output", "model.lm_head.output"),
        ("model.transformer.layers[4].mlp.output", "model.model.layers[4].mlp.output"),
    ];
    for (text, nearest) in cases {
        let FindError::Unknown { nearest: found, .. } = llama().expand(&path(text)).unwrap_err()
        else {
            panic!("{text}");
        };
        assert_eq!(found.first().map(String::as_str), Some(nearest), "{text}: {found:?}");
        assert!(found.len() <= 3, "{found:?}");
    }
}

#[test]
fn numbers_with_gaps_count_from_the_highest() {
    let tree = ModuleTree::new(["experts", "experts.3", "experts.7", "experts.07", "experts.x"]);
    let found = |text: &str| tree.expand(&path(text)).map(|paths| texts(&paths));
    assert_eq!(
        found("model.experts[:].output").unwrap(),
        ["model.experts[3].output", "model.experts[7].output"]
    );
    assert_eq!(found("model.experts[-1].output").unwrap(), ["model.experts[7].output"]);
    assert_eq!(found("model.experts.07.output").unwrap(), ["model.experts.07.output"]);
    assert_eq!(
        found("model.experts[-3].output").unwrap_err().to_string(),
        "`model.experts[-3].output` names nothing here: \
         `model.experts` has no [-3], which is [5]; nearest: [3], [7]"
    );
}

#[test]
fn a_slice_takes_the_branches_that_have_the_rest_and_a_list_entry_must_have_it() {
    let tree = ModuleTree::new(["h.0", "h.0.mlp", "h.1", "h.1.moe", "h.2", "h.2.mlp"]);
    let found = |text: &str| tree.expand(&path(text)).map(|paths| texts(&paths));
    assert_eq!(
        found("model.h[:].mlp.output").unwrap(),
        ["model.h[0].mlp.output", "model.h[2].mlp.output"]
    );
    assert_eq!(
        found("model.h[0,1].mlp.output").unwrap_err().to_string(),
        "`model.h[1].mlp.output` names nothing here; nearest: \
         `model.h[0].mlp.output`, `model.h[2].mlp.output`, `model.h[1].output`"
    );
    assert!(found("model.h.output").is_err(), "a module that is not listed is none");
}

#[test]
fn modules_that_no_path_can_write_are_left_out() {
    let tree = ModuleTree::new(["", "a b", "a b.c", "x[0]", "y@z", "", ".."]);
    assert_eq!(texts(&tree.expand(&path("model.output")).unwrap()), ["model.output"]);
    assert!(tree.expand(&path("model.x[0].output")).is_err());
}

#[test]
fn brackets_mean_what_was_recorded() {
    let sites = [
        "model.a.output",
        "model.a.attn.output[0]",
        "model.a.attn.output[1]",
        "model.b.output",
        "model.b.output[2]",
    ];
    let index = SiteIndex::new(sites, BTreeMap::new());
    let find = |text: &str| index.find(text);
    assert_eq!(find("model.a.output[0]").unwrap(), [(0, Some(Selector::Index(0)))]);
    assert_eq!(find("model.a.attn.output[0]").unwrap(), [(1, None)]);
    assert_eq!(find("model.a.attn.output[1][-1]").unwrap(), [(2, Some(Selector::Index(-1)))]);
    assert_eq!(
        find("model.b.output[2]").unwrap(),
        [(4, None)],
        "the longest recorded element wins"
    );
    assert_eq!(find("model.b.output[3]").unwrap(), [(3, Some(Selector::Index(3)))]);
    assert_eq!(
        find("model.a.attn.output").unwrap_err().to_string(),
        "`model.a.attn.output` names none of the recorded elements of its port; recorded: \
         `model.a.attn.output[0]`, `model.a.attn.output[1]`"
    );
    assert_eq!(
        find("model.a.outptu.output").unwrap_err().to_string(),
        "`model.a.outptu.output` names nothing here; nearest: `model.a.output`"
    );
}

#[test]
fn lookup_gives_sites_in_store_order_by_root_form_or_own_name() {
    let sites: Vec<_> = (0..12)
        .rev()
        .step_by(2)
        .map(|layer| format!("model.model.layers[{layer}].output"))
        .collect();
    let index = SiteIndex::new(&sites, BTreeMap::from([("model.layers".to_owned(), 13)]));
    let numbers = |text: &str| {
        index.find(text).map(|found| found.iter().map(|(site, _)| *site).collect::<Vec<_>>())
    };
    assert_eq!(numbers("model.layers[:].output[-4:]").unwrap(), [0, 1, 2, 3, 4, 5]);
    assert_eq!(numbers("model.layers[1, 11].output").unwrap(), [0, 5]);
    assert_eq!(numbers("model.layers.11.output").unwrap(), [0]);
    assert_eq!(numbers("model.layers[-2].output").unwrap(), [0], "counted from the model's end");
    assert_eq!(
        numbers("model.layers[-1].output").unwrap_err().to_string(),
        "`model.layers[-1].output` names nothing here: `model.model.layers` has no [-1], \
         which is [12]; nearest: [5], [7], [9], [11]"
    );
    let lengths = llama().lengths(&[path("model.model.layers[3].output")]);
    assert_eq!(lengths, BTreeMap::from([("model.layers".to_owned(), 12)]));
}

#[test]
fn calls_ports_and_gradients_are_told_apart() {
    let sites = [
        "model.a.output",
        "model.a.output@1",
        "model.a.output@2",
        "model.a.input",
        "model.a.output.grad",
    ];
    let index = SiteIndex::new(sites, BTreeMap::new());
    let numbers =
        |text: &str| index.find(text).unwrap().iter().map(|(site, _)| *site).collect::<Vec<_>>();
    assert_eq!(numbers("model.a.output@0[3]"), [0]);
    assert_eq!(numbers("model.a.output@:"), [0, 1, 2]);
    assert_eq!(numbers("model.a.output@1:[-1]"), [1, 2]);
    assert_eq!(numbers("model.a.input[:]"), [3]);
    assert_eq!(numbers("model.a.output.grad[7]"), [4]);
}
