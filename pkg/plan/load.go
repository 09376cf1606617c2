package plan

import (
	"context"
	"fmt"
	"net/url"
	"path"

	"github.com/prebake/prebake/pkg/cosbucket"
)

// LoadImageMap reads the image map at a URL. If the URL is "", LoadImageMap returns nil as map and as error.
func LoadImageMap(ctx context.Context, rawURL string) (*ImageMap, error) {
	if rawURL == "" {
		return nil, nil
	}
	u, err := url.Parse(rawURL)
	if err != nil {
		return nil, err
	}
	name := path.Base(u.Path)
	u.Path = path.Dir(u.Path)
	bucket, err := cosbucket.Open(ctx, u.String())
	if err != nil {
		return nil, fmt.Errorf("read image map: %w", err)
	}
	defer bucket.Close()
	text, err := bucket.ReadSmall(ctx, name, MaxImageMap)
	if err != nil {
		return nil, fmt.Errorf("read image map: %w", err)
	}
	return ParseImageMap(text)
}
