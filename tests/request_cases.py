"""Requests, good and bad, for the tests of whatever reads them: what is taken, what is refused and how."""

from router.errors import ApiError
from router.http.requests import MAX_TARGET_BYTES, Limits, RequestReader

LIMITS = Limits(head_bytes=16_000, headers=210, body_bytes=100)
CHUNKED = b"POST /p HTTP/1.1\r\nhost: h\r\ntransfer-encoding: chunked\r\n\r\n"


def read(*parts, limits=LIMITS):
    """The requests in these bytes, and the error that ends them."""
    reader, requests = RequestReader(limits), []
    try:
        for part in parts:
            reader.feed(part)
            while (request := reader.next()) is not None:
                requests.append(request)
    except ApiError as error:
        return requests, error
    return requests, None


def line(request_line, *headers):
    return b"\r\n".join([request_line, b"host: h", *headers, b"", b""])


def get(*headers, target=b"/p"):
    return line(b"GET %b HTTP/1.1" % target, *headers)


def sized(*headers):
    return line(b"POST /p HTTP/1.1", *headers) + b"body"


# Each with what is left of it: (target, body). In the order of the grammar: line, headers, body.
TAKEN = {
    "plain": (get(), "/p", b""),
    "blank lines before it": (b"\r\n\r\n" + get(), "/p", b""),
    "a lower-case method is another method": (line(b"post /p HTTP/1.1"), "/p", b""),
    "an unknown method": (line(b"BREW /p HTTP/1.1"), "/p", b""),
    "HTTP/1.0 without a host": (b"GET /p HTTP/1.0\r\n\r\n", "/p", b""),
    "HTTP/1.2, which is read as 1.1": (line(b"GET /p HTTP/1.2"), "/p", b""),
    "absolute form": (get(target=b"http://other:1/v1/x?q=1"), "/v1/x?q=1", b""),
    "absolute form, https": (get(target=b"HTTPS://other/v1/x"), "/v1/x", b""),
    "absolute form without a path": (get(target=b"http://other"), "/", b""),
    "absolute form with a query only": (get(target=b"http://other?q"), "/?q", b""),
    "asterisk form": (line(b"OPTIONS * HTTP/1.1"), "*", b""),
    "two slashes are kept": (get(target=b"//v1/x"), "//v1/x", b""),
    "percent-encodings are kept": (get(target=b"/v1%2fx?%zz"), "/v1%2fx?%zz", b""),
    "dots are kept": (get(target=b"/v1/../x"), "/v1/../x", b""),
    "a target of the greatest length": (
        get(target=b"/" + b"p" * (MAX_TARGET_BYTES - 1)), "/" + "p" * (MAX_TARGET_BYTES - 1), b"",
    ),
    "an empty host": (b"GET /p HTTP/1.1\r\nhost:\r\n\r\n", "/p", b""),
    "an empty value": (get(b"a:"), "/p", b""),
    "bytes beyond ASCII in a value": (get(b"a: \xff\xc3\xa4"), "/p", b""),
    "200 small headers": (get(*(b"h%d: v" % i for i in range(200))), "/p", b""),
    "an upgrade, which is not taken up": (
        sized(b"connection: upgrade, x", b"upgrade: h2c", b"x: A", b"content-length: 4"), "/p", b"body",
    ),
    "content-length": (sized(b"Content-Length: 4"), "/p", b"body"),
    "content-length 0": (line(b"POST /p HTTP/1.1", b"content-length: 0"), "/p", b""),
    "content-length with zeros before it": (sized(b"content-length: 0004"), "/p", b"body"),
    "GET with a body": (get(b"content-length: 4") + b"body", "/p", b"body"),
    "an expectation": (sized(b"expect: 100-continue", b"content-length: 4"), "/p", b"body"),
    "chunked": (CHUNKED + b"2\r\nbo\r\n2\r\ndy\r\n0\r\n\r\n", "/p", b"body"),
    "CHUNKED": (line(b"PUT /p HTTP/1.1", b"transfer-encoding: CHUNKED") + b"0\r\n\r\n", "/p", b""),
    "chunk extensions": (CHUNKED + b'4;a=1 ;b="c"\r\nbody\r\n0;x\r\n\r\n', "/p", b"body"),
    "a chunk size with zeros before it": (CHUNKED + b"00004\r\nbody\r\n000\r\n\r\n", "/p", b"body"),
    "trailers": (CHUNKED + b"4\r\nbody\r\n0\r\nauthorization: x\r\nb: y\r\n\r\n", "/p", b"body"),
}  # fmt: skip


# Each with its status. In the order of the grammar.
REFUSED = {
    "no request line": (b"nonsense\r\n\r\n", 400),
    "a TLS hello": (b"\x16\x03\x01\x02\x00\x01\x00\x01\xfc\x03\x03", 400),
    "HTTP/0.9": (b"GET /p\r\n\r\n", 400),
    "HTTP/0.9 with a version": (line(b"GET /p HTTP/0.9"), 400),
    "HTTP/2's preface": (b"PRI * HTTP/2.0\r\n\r\nSM\r\n\r\n", 400),
    "HTTP/3.0": (line(b"GET /p HTTP/3.0"), 400),
    "HTTP/1.10": (line(b"GET /p HTTP/1.10"), 400),
    "another protocol": (line(b"GET /p ICY/1.1"), 400),
    "http/1.1": (line(b"GET /p http/1.1"), 400),
    "an empty method": (line(b" /p HTTP/1.1"), 400),
    "a method that is no token": (line(b"G(T /p HTTP/1.1"), 400),
    "two spaces": (line(b"GET  /p HTTP/1.1"), 400),
    "a tab for a space": (line(b"GET\t/p HTTP/1.1"), 400),
    "a space at the end of the line": (line(b"GET /p HTTP/1.1 "), 400),
    "an empty target": (line(b"GET  HTTP/1.1"), 400),
    "a space in the target": (get(target=b"/p q"), 400),
    "bytes beyond ASCII in the target": (get(target=b"/\xc3\xa4"), 400),
    "a fragment": (get(target=b"/p#f"), 400),
    "a relative target": (get(target=b"p"), 400),
    "an authority": (get(target=b"h:80"), 400),
    "a URL of another scheme": (get(target=b"ftp://h/p"), 400),
    "a URL without a host": (get(target=b"http:///p"), 400),
    "a URL with a user": (get(target=b"http://u:p@h/"), 400),
    "a URL with a fragment": (get(target=b"http://h/p#f"), 400),
    "* for another method": (get(target=b"*"), 400),
    "CONNECT": (line(b"CONNECT h:1 HTTP/1.1"), 400),
    "CONNECT to a path": (line(b"CONNECT / HTTP/1.1"), 400),
    "a target that is too long": (get(target=b"/" + b"p" * MAX_TARGET_BYTES), 414),
    "a request line without an end": (b"GET /" + b"p" * 16_000, 414),
    "a method without an end": (b"G" * 16_001, 414),
    "headers without an end": (b"GET /p HTTP/1.1\r\na: " + b"b" * 16_000, 431),
    "large headers": (get(b"a: " + b"b" * 16_000), 431),
    "many headers": (get(*[b"a: b"] * 210), 431),
    "no host": (b"GET /p HTTP/1.1\r\n\r\n", 400),
    "two hosts": (get(b"host: h"), 400),
    "two hosts in HTTP/1.0": (line(b"GET /p HTTP/1.0", b"host: i"), 400),
    "a host that is none": (b"GET /p HTTP/1.1\r\nhost: a, b\r\n\r\n", 400),
    "bare LF": (b"GET /p HTTP/1.1\nhost: h\n\n", 400),
    "bare LF after the request line": (b"GET /p HTTP/1.1\nhost: h\r\n\r\n", 400),
    "bare LF within the headers": (get(b"a: b\nc: d"), 400),
    "bare LF at the end": (b"GET /p HTTP/1.1\r\nhost: h\r\n\n", 400),
    "bare CR within a value": (get(b"a: b\rc"), 400),
    "bare CR at the end of a line": (b"GET /p HTTP/1.1\rhost: h\r\n\r\n", 400),
    "bare CR in headers without an end": (b"GET /p HTTP/1.1\r\nhost: h\ra: b", 400),
    "NUL in a value": (get(b"a: b\0"), 400),
    "DEL in a value": (get(b"a: b\x7f"), 400),
    "a control character in a name": (get(b"a\x01: b"), 400),
    "a folded header": (get(b"a: b", b" c"), 400),
    "a folded header at first": (b"GET /p HTTP/1.1\r\n host: h\r\n\r\n", 400),
    "a space before the colon": (get(b"a : b"), 400),
    "a space in a name": (get(b"a b: c"), 400),
    "a header without a colon": (get(b"a"), 400),
    "a header without a name": (get(b": b"), 400),
    "bytes beyond ASCII in a name": (get(b"\xc3\xa4: b"), 400),
    "content-length twice": (sized(b"content-length: 4", b"content-length: 4"), 400),
    "two content-lengths": (sized(b"content-length: 4", b"content-length: 5"), 400),
    "a list of content-lengths": (sized(b"content-length: 4, 4"), 400),
    "content-length -1": (sized(b"content-length: -1"), 400),
    "content-length +4": (sized(b"content-length: +4"), 400),
    "content-length 0x4": (sized(b"content-length: 0x4"), 400),
    "content-length 4_0": (sized(b"content-length: 4_0"), 400),
    "content-length 4.0": (sized(b"content-length: 4.0"), 400),
    "an empty content-length": (sized(b"content-length:"), 400),
    "a content-length in other digits": (sized("content-length: ٤".encode()), 400),
    "a content-length over the limit": (sized(b"content-length: 101"), 413),
    "a content-length of 5000 digits": (sized(b"content-length: " + b"9" * 5000), 413),
    "content-length and chunked": (sized(b"content-length: 4", b"transfer-encoding: chunked"), 400),
    "chunked and content-length": (sized(b"transfer-encoding: chunked", b"content-length: 4"), 400),
    "chunked in HTTP/1.0": (line(b"POST /p HTTP/1.0", b"transfer-encoding: chunked"), 400),
    "gzip": (sized(b"transfer-encoding: gzip"), 400),
    "gzip, chunked": (sized(b"transfer-encoding: gzip, chunked"), 400),
    "chunked, gzip": (sized(b"transfer-encoding: chunked, gzip"), 400),
    "chunked, chunked": (sized(b"transfer-encoding: chunked, chunked"), 400),
    "chunked twice": (sized(b"transfer-encoding: chunked", b"transfer-encoding: chunked"), 400),
    "identity": (sized(b"transfer-encoding: identity"), 400),
    "xchunked": (sized(b"transfer-encoding: xchunked"), 400),
    "chunked with a vertical tab": (sized(b"transfer-encoding: \x0bchunked"), 400),
    "chunked with a parameter": (sized(b"transfer-encoding: chunked;q=1"), 400),
    "an empty transfer-encoding": (sized(b"transfer-encoding:"), 400),
    "a chunk size that is none": (CHUNKED + b"x\r\n", 400),
    "a chunk size with a sign": (CHUNKED + b"-1\r\n", 400),
    "a chunk size in the style of C": (CHUNKED + b"0x1\r\n", 400),
    "a chunk size with a space before it": (CHUNKED + b" 1\r\na\r\n", 400),
    "a chunk size with a space after it": (CHUNKED + b"1 \r\na\r\n", 400),
    "an empty chunk size": (CHUNKED + b"\r\n", 400),
    "a chunk size of 17 digits": (CHUNKED + b"0" * 16 + b"1\r\na\r\n", 400),
    "a chunk size of thousands of digits": (CHUNKED + b"1" * 5000, 400),
    "bare LF after a chunk size": (CHUNKED + b"1\na\r\n0\r\n\r\n", 400),
    "bare LF in a chunk extension": (CHUNKED + b"1;\na\r\n0\r\n\r\n", 400),
    "bare CR in a chunk extension": (CHUNKED + b"1;\ra\r\na\r\n0\r\n\r\n", 400),
    "a chunk that is longer than its size": (CHUNKED + b"1\r\nab\r\n", 400),
    "a chunk that ends in bare LF": (CHUNKED + b"1\r\na\n0\r\n\r\n", 400),
    "a chunk extension without an end": (CHUNKED + b"1;" + b"a" * 256, 400),
    "chunk extensions that are too many": (CHUNKED + (b"1;" + b"a" * 250 + b"\r\nb\r\n") * 70, 431),
    "a chunk over the limit": (CHUNKED + b"65\r\n", 413),
    "chunks over the limit": (CHUNKED + b"60\r\n" + b"x" * 96 + b"\r\n5\r\n", 413),
    "a trailer that is no header": (CHUNKED + b"0\r\nbad trailer\r\n\r\n", 400),
    "bare LF at the end of the trailers": (CHUNKED + b"0\r\n\n", 400),
    "trailers without an end": (CHUNKED + b"0\r\na: " + b"b" * 16_000, 431),
    "trailers that are too many": (CHUNKED + b"0\r\n" + b"a: b\r\n" * 4_000, 431),
}

# All of those that are short enough to be tried many times.
SHORT = [case[0] for case in (*TAKEN.values(), *REFUSED.values()) if len(case[0]) < 2000]
