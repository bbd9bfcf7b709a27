//! temporary
use conclave_model::tokenizer::*;
use std::path::Path;
fn main() {
    let arg: Vec<String> = std::env::args().collect();
    let levels: usize = arg[1].parse().unwrap();
    let tail = &arg[2];
    let stack: usize = arg[3].parse().unwrap();
    let src = format!("{{% set ns = namespace(x=[]) %}}{{% for i in range({}) %}}{{% for j in range(100) %}}{{% set ns.x = [[[[[[[[[[ns.x]]]]]]]]]] %}}{{% endfor %}}{{% endfor %}}{tail}", levels / 1000);
    std::fs::create_dir_all("/tmp/tok/deep").unwrap();
    std::fs::write("/tmp/tok/deep/chat_template.jinja", src).unwrap();
    let ct = ChatTemplate::load(Path::new("/tmp/tok/deep")).unwrap().unwrap();
    let r = std::thread::Builder::new().stack_size(stack << 10).spawn(move || ct.render(&[], true)).unwrap().join();
    println!("deep {:?}", r.map(|r| r.map(|s| s.len())));
}
