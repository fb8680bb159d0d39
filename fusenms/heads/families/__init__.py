"""One file per detector family: a `HeadSpec` each."""
