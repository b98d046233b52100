// What build.py puts in front of the modules; read by editors and by tsc, never by a browser.

/** What the request `boot` answers, with `recorded`, names of files, and of each model `device` (build.py). */
declare const BOOT: any;
