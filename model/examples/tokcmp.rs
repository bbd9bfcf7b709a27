//! temporary
use conclave_model::tokenizer::*;
use std::path::Path;
fn main() {
    let cases: serde_json::Value = serde_json::from_str(&std::fs::read_to_string("/tmp/tok/cases.json").unwrap()).unwrap();
    for (dir, cases) in cases.as_object().unwrap() {
        let path = Path::new("/tmp/tok").join(dir);
        let t0 = std::time::Instant::now();
        let t = Tokenizer::load(&path).unwrap().unwrap();
        println!("{dir}: load {:?} vocab {}", t0.elapsed(), t.vocab_size());
        let (mut bad, mut n, mut toks) = (0, 0, 0);
        let t0 = std::time::Instant::now();
        for case in cases["texts"].as_array().unwrap() {
            let text = case["text"].as_str().unwrap();
            let ids: Vec<u32> = case["ids"].as_array().unwrap().iter().map(|i| i.as_u64().unwrap() as u32).collect();
            let got = t.encode(text, true).unwrap();
            n += 1; toks += got.len();
            let mut d = t.incremental(&[], false);
            let streamed: String = got.iter().map(|&i| d.push(i).unwrap()).collect::<String>() + &d.finish().unwrap();
            if got != ids || t.decode(&got, true).unwrap() != case["skip"] || t.decode(&got, false).unwrap() != case["full"] || streamed != case["full"].as_str().unwrap() { bad += 1; println!("DIFF {text:.80?}"); }
            if t.decode(&got, false).unwrap() != text { println!("no round trip {text:.80?}"); }
        }
        println!("  {n} texts {toks} tokens {bad} differ {:?}", t0.elapsed());
        let ct = ChatTemplate::load(&path).unwrap();
        println!("  template {}", ct.is_some());
        for case in cases["chats"].as_array().unwrap() {
            let m: Vec<Message> = case["messages"].as_array().unwrap().iter().map(|m| Message { role: m["role"].as_str().unwrap().into(), content: m["content"].as_str().unwrap().into() }).collect();
            let got = ct.as_ref().unwrap().render(&m, case["gen"].as_bool().unwrap()).unwrap();
            println!("  chat {}", got == case["text"].as_str().unwrap());
        }
    }
    for src in ["{% set ns = namespace(x=[]) %}{% for i in range(9999) %}{% for j in range(10) %}{% set ns.x = [ns.x] %}{% endfor %}{% endfor %}done",
        "{% set ns = namespace(x=[]) %}{% for i in range(9999) %}{% for j in range(3) %}{% set ns.x = [ns.x] %}{% endfor %}{% endfor %}{{ ns.x }}",
        "{% set ns = namespace(x=[]) %}{% for i in range(9999) %}{% for j in range(3) %}{% set ns.x = [ns.x] %}{% endfor %}{% endfor %}{{ ns.x == [ns.x] }}"] {
        std::fs::create_dir_all("/tmp/tok/deep").unwrap();
        std::fs::write("/tmp/tok/deep/chat_template.jinja", src).unwrap();
        let ct = ChatTemplate::load(Path::new("/tmp/tok/deep")).unwrap().unwrap();
        let r = std::thread::Builder::new().stack_size(2 << 20).spawn(move || ct.render(&[], true)).unwrap().join();
        println!("deep {:?}", r.map(|r| r.map(|s| s.len())));
    }
}
