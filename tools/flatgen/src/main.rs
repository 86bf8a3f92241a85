fn main() { println!("{}", flatc_fork::flatc().display()); }
