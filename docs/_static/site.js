// Opened as a file, a page may not read other files, and the search would ask for each page it found to show a few lines of it. Titles are enough then.
if (location.protocol === "file:" && typeof DOCUMENTATION_OPTIONS !== "undefined") DOCUMENTATION_OPTIONS.SHOW_SEARCH_SUMMARY = false;
