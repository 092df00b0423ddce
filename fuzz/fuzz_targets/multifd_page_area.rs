#![cfg_attr(fuzzing, no_main)]
qevm_fuzz::entry!(multifd_page_area);
