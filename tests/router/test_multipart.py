import email
import email.policy

import pytest
from hypothesis import given
from hypothesis import strategies as st

from router.errors import BadRequest
from router.multipart import find_field, is_form, replaced

TYPE = b"multipart/form-data; boundary=b"


def part(name, value, *, disposition=None, head=b""):
    disposition = disposition or b'form-data; name="%b"' % name
    return b"Content-Disposition: %b\r\n%b\r\n%b" % (disposition, head, value)


def form(*parts, boundary=b"b"):
    return b"".join(b"--%b\r\n%b\r\n" % (boundary, p) for p in parts) + b"--%b--\r\n" % boundary


FILE = part(
    b"file",
    b'RIFF\r\n--bb\r\nContent-Disposition: form-data; name="model"\r\n\r\nno\r\n--b-\r\n',
    disposition=b'form-data; name="file"; filename="a; name=\\"model\\".wav"',
    head=b"Content-Type: audio/wav\r\n",
)
MODEL = part(b"model", b"whisper")


def model_in(body, content_type=TYPE):
    span = find_field(content_type, body, "model")
    return None if span is None else body[span.begin : span.end]


@pytest.mark.parametrize(
    ("body", "model"),
    [
        (form(MODEL), b"whisper"),
        (form(FILE, MODEL), b"whisper"),
        (form(MODEL, FILE), b"whisper"),
        (form(FILE), None),
        (form(), None),
        (form(part(b"model", b"")), b""),
        (form(part(b"model", b"a\r\nb")), b"a\r\nb"),
        (form(part(b"model", b"m\r\n")), b"m\r\n"),
        (form(part(b"models", b"x"), part(b"Model", b"y")), None),
        (form(part(b"model", b"x", disposition=b'form-data; name="model"; filename="m"')), None),
        (form(part(b"model", b"x", disposition=b"form-data; filename*=utf-8''m; name=model")), None),
        (form(part(b"model", b"x", disposition=b"FORM-DATA;name=model ; x=1")), b"x"),
        (form(part(b"model", b"x", disposition=b'attachment; name="model"')), None),
        (form(part(b"model", b"x", head=b"Content-Type: text/plain; charset=utf-8\r\n")), b"x"),
        (form(b"\r\nno head", MODEL), b"whisper"),
        (b"a preamble\r\n" + form(MODEL) + b"an epilogue\r\n--b\r\n", b"whisper"),
    ],
)
def test_the_model_of_a_form(body, model):
    assert model_in(body) == model


@pytest.mark.parametrize(
    ("content_type", "boundary"),
    [
        (b"multipart/form-data; boundary=b", b"b"),
        (b'Multipart/Form-Data;charset=utf-8;BOUNDARY="a b:c=\'"', b"a b:c='"),
        (b'multipart/form-data; boundary="a\\"b"', b'a"b'),
        (b"multipart/form-data; x=boundary=no; boundary=----WebKitFormX", b"----WebKitFormX"),
    ],
)  # fmt: skip
def test_boundaries_as_headers_write_them(content_type, boundary):
    assert is_form(content_type)
    assert model_in(form(FILE, MODEL, boundary=boundary), content_type) == b"whisper"


@pytest.mark.parametrize(
    ("body", "content_type", "told"),
    [
        (form(MODEL, part(b"model", b"other")), TYPE, "'model' is given twice"),
        (form(MODEL), b"multipart/form-data", "no boundary"),
        (form(MODEL), b'multipart/form-data; boundary=""', "no boundary"),
        (form(MODEL), b"multipart/form-data; boundary=c", "boundary is another"),
        (form(MODEL)[:-6], TYPE, "has no end"),
        (b"", TYPE, "has no end"),
        (form(MODEL).replace(b"\r\n", b"\n"), TYPE, "no head"),
        (b"--b\r\nContent-Disposition: form-data\r\n--b--\r\n", TYPE, "no head"),
        (b"--b \r\n\r\nx\r\n--b--", TYPE, "no head"),
        (form(*[b"\r\n"] * 1001), TYPE, "more than 1000 parts"),
        (form(part(b"model", b"x", head=b"X-Long: " + b"x" * 20_000 + b"\r\n")), TYPE, "no head"),
    ],
)
def test_what_is_no_form_is_refused(body, content_type, told):
    with pytest.raises(BadRequest, match=told):
        find_field(content_type, body, "model")


@pytest.mark.parametrize("given", [None, b"application/json", b"multipart/mixed; boundary=b"])
def test_other_bodies_are_no_forms(given):
    assert not is_form(given)


names = st.sampled_from(["file", "language", "prompt", "response_format"])
boundaries = st.text("abcXYZ019'()+_,-./:=?", min_size=1, max_size=70).map(str.encode)
# What comes near a delimiter, cut anywhere.
scraps = st.sampled_from(
    [b"\r", b"\n", b"-", b"--", b"\r\n--", b"\r\n", b"x", b"--b", b"\r\n--b", b'name="model"']
)
contents = st.one_of(st.binary(max_size=40), st.lists(scraps, max_size=12).map(b"".join))


@given(
    others=st.lists(st.tuples(names, contents, st.booleans()), max_size=4),
    place=st.integers(0, 4),
    value=st.text(st.characters(codec="utf-8", exclude_characters="\r\n"), min_size=1, max_size=20),
    boundary=boundaries,
    new=st.text("abc/-.", min_size=1, max_size=20),
)
def test_the_model_is_found_and_replaced_among_anything(others, place, value, boundary, new):
    parts = [
        part(
            name.encode(),
            content,
            disposition=b'form-data; name="%b"; filename="f"' % name.encode() if is_file else None,
        )
        for name, content, is_file in others
    ]
    parts.insert(place, part(b"model", value.encode()))
    if any(b"\r\n--" + boundary in b"\r\n" + p + b"\r\n" for p in parts):
        return  # no writer of forms takes a boundary that is in the content
    content_type = b'multipart/form-data; boundary="' + boundary + b'"'
    body = form(*parts, boundary=boundary)
    span = find_field(content_type, body, "model")
    assert body[span.begin : span.end] == value.encode()
    changed = replaced(body, span, new.encode())
    assert model_in(changed, content_type) == new.encode()
    assert changed == body[: span.begin] + new.encode() + body[span.end :]


@given(body=st.lists(st.one_of(scraps, st.binary(max_size=8)), max_size=30).map(b"".join))
def test_any_bytes_are_a_form_or_refused(body):
    try:
        span = find_field(TYPE, body, "model")
    except BadRequest:
        return
    assert span is None or 0 < span.begin <= span.end <= len(body)


def test_a_reader_of_mime_sees_the_new_model_and_all_else_as_it_was():
    body = form(FILE, MODEL, part(b"language", b"en"))
    span = find_field(TYPE, body, "model")
    changed = replaced(body, span, b"a-longer-name")

    def fields(form_body):
        head = b"content-type: " + TYPE + b"\r\n\r\n"
        parts = email.message_from_bytes(head + form_body, policy=email.policy.HTTP).iter_parts()
        return {p.get_param("name", header="content-disposition"): p.get_payload(decode=True) for p in parts}

    assert fields(changed) == {**fields(body), "model": b"a-longer-name"}
