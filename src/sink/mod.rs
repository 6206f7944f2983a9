//! stub: see DESIGN 7
